"""The compress stage of a recipe: llama.cpp's own presets, tried one by one."""
