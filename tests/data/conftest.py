"""The real tokenizer, and others made of it by giving it another template."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danlu.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm(smollm2: Path) -> Tokenizer:
    """The tokenizer and chat template of SmolLM2-135M-Instruct."""
    return Tokenizer.load(smollm2)


@pytest.fixture(scope="session")
def with_template(smollm: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """SmolLM2's tokenizer with another chat template, and special tokens more."""

    def make(template: str, *special: str) -> Tokenizer:
        directory = tmp_path_factory.mktemp("tokenizer")
        smollm.save(directory)
        file = directory / "tokenizer.json"
        document = json.loads(file.read_text(encoding="utf-8"))
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for number, content in enumerate(special, smollm.vocab_size):
            document["added_tokens"].append({"id": number, "content": content, **flags})
        file.write_text(json.dumps(document), encoding="utf-8")
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        return Tokenizer.load(directory)

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Writes a file: text or bytes as they are, a list as JSON lines; gzipped if its name ends in .gz."""

    def make(name: str, content: Any) -> Path:
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        raw = content.encode("utf-8") if isinstance(content, str) else content
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return make
