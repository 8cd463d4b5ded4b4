"""`gemcut info`: sizes, room, the engine that would be made, and checks of files."""

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from allocations import tensor_bytes
from safetensors.torch import load_file, save_file

from gemcut.engine import PUBLISHED, Engine, cli, info, memory
from gemcut.engine.checkpoints import hub
from gemcut.engine.checkpoints.convert import convert
from gemcut.engine.execution.weights import QUANTIZATIONS, empty_weights, made_layouts
from gemcut.kernels import cpu
from gemcut.kernels.cpu_products import packs


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the demo checkpoint."""
    return Path(shutil.copytree(hub.DEMO, tmp_path / "model"))


@pytest.mark.parametrize(
    ("model", "parameters", "kib_per_token"),
    [  # from the published config.json files
        ("gemma-2b", 2.506e9, 18),
        ("gemma-7b", 8.538e9, 448),
        ("gemma-2-2b", 2.614e9, 104),
        ("gemma-2-9b", 9.242e9, 336),
        ("gemma-2-27b", 27.227e9, 368),
        ("vaultgemma-1b", 1.039e9, 104),
    ],
)
def test_info_of_a_published_size_asks_nobody(run, monkeypatch, model, parameters, kib_per_token):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    code, out, err = run("info", model, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    facts = json.loads(out)
    assert facts["parameters"] == pytest.approx(parameters, rel=1e-3)
    assert facts["weight_bytes"]["bfloat16"] == 2 * facts["parameters"]
    assert facts["weight_bytes"]["float32"] == 4 * facts["parameters"]
    assert facts["kv_bytes_per_token"] == kib_per_token * 1024
    assert facts["config"]["num_hidden_layers"] == PUBLISHED[model].num_layers


@pytest.fixture
def set_free(monkeypatch):
    """A function that sets the number of free bytes."""

    def set_free(free: float) -> None:
        for module in (info, memory):
            monkeypatch.setattr(module, "free_bytes", lambda device: int(free))

    return set_free


def test_info_for_people(run, set_free):
    set_free(60e9)
    code, out, err = run("info", "gemma-2-9b", "--device", "cpu", "--dtype", "float32")
    assert (code, err) == (0, "")
    assert out == (
        "model         gemma-2-9b\n"
        "family        Gemma 2 (gemma2)\n"
        "parameters    9,241,705,984\n"
        "weights       18.48 GB in bfloat16, 36.97 GB in float32\n"
        "              9.25 GB in int8, 5.60 GB in int4, 9.25 GB in fp8\n"
        "layers        42: 21 local (window 4096), 21 global\n"
        "hidden size   3584, MLP 14336\n"
        "heads         16 query, 8 key and value, head_dim 256, scale 0.0625\n"
        "vocabulary    256000, embedding and head tied\n"
        "softcaps      attention 50, logits 30\n"
        "rope          base 10,000\n"
        "longest text  8192 tokens\n"
        "KV cache      336 KiB a token in bfloat16, half in fp8\n"
        "              2.20 GB a slot of 8192 tokens; 2.82 GB if local layers were no rings\n"
        "on cpu        60.00 GB free, 36.97 GB for weights in float32\n"
        "              room for 2 slots of 8192 tokens\n"
        "              longest slot, in tokens: 8192 at batch 1, 1976 at batch 8\n"
        "in int8       9.25 GB for weights, room for 8 slots of 8192 tokens\n"
        "in int4       5.60 GB for weights, room for 9 slots of 8192 tokens\n"
        "in fp8        9.25 GB for weights, room for 8 slots of 8192 tokens\n"
        "an engine     8 x 1976 tokens take 48.00 GB\n"
        "              36.97 GB weights, 10.88 GB KV cache, 23.04 MB sampling state, "
        "127.93 MB activations\n"
        "              and of the host about 105.47 MB for its tokenizer\n"
    )


@pytest.mark.parametrize(("name", "size"), [("tokenizer.model", 412), ("tokenizer.json", 606)])
def test_a_tokenizer_s_share_depends_on_its_file(folder, run, name, size):
    (folder / "tokenizer.model").rename(folder / name)
    assert json.loads(run("info", str(folder), "--json")[1])["tokenizer_bytes"] == 3072 * size


@pytest.mark.skipif(
    not packs((64, 64), torch.bfloat16), reason="the table is of a CPU that packs bfloat16"
)
@pytest.mark.parametrize("model", PUBLISHED)
def test_the_table_of_the_first_page_says_the_same(model):
    config, cpu_device = PUBLISHED[model], torch.device("cpu")
    page = (Path(__file__).parents[2] / "README.md").read_text()
    shown = re.search(rf"^\| google/{model}(?:-pt)? \| (.*) \|$", page, re.MULTILINE)[1].split(
        " | "
    )
    parameters = config.num_parameters()
    build = memory.Build(config, cpu_device, torch.bfloat16, cpu)
    engine = build.estimate(1, min(8192, config.context_length)).total
    facts = [parameters, 2 * parameters, 4 * parameters, engine]
    units = ["B", "GB", "GB", "GB"]
    assert shown == [f"{x / 1e9:.2f} {unit}" for x, unit in zip(facts, units, strict=True)]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_each_format_is_counted_as_it_is_made(set_free, quantization):
    """To the byte, from the config alone."""
    set_free(30e9)
    config, device = PUBLISHED["gemma-2-9b"], torch.device("cpu")
    layouts = made_layouts(config, quantization)
    made = empty_weights(config, device="meta", dtype=torch.bfloat16, layouts=layouts)
    facts = info.describe(config, device, torch.float32, 1, 512, quantization)
    assert facts.weight_bytes[quantization] == made.nbytes
    rooms = {room.quantization: room for room in facts.quantized_rooms}
    assert rooms[quantization] == facts.room
    assert facts.room.weight_bytes == facts.engine.bytes["weights"]
    plain = info.describe(config, device, torch.float32, 1, 512)
    assert plain.quantized_rooms == facts.quantized_rooms
    assert plain.room.slots < facts.room.slots


def test_rooms_are_of_the_dtype_that_each_engine_takes(run, folder):
    facts = json.loads(run("info", str(folder), "--json", "--device", "cpu")[1])
    assert facts["room"]["dtype"] == "float32"
    for room in facts["quantized_rooms"]:
        with Engine.from_pretrained(
            folder, quantization=room["quantization"], device="cpu", max_batch_size=1
        ) as engine:
            assert room["dtype"] == str(engine.model.dtype).removeprefix("torch.")
            assert room["weight_bytes"] == pytest.approx(tensor_bytes(engine.model.weights), 0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_engine_takes_what_info_says(run, folder, quantization, dtype):
    options = ["--quantization", quantization, "--dtype", dtype, "--device", "cpu"]
    facts = json.loads(run("info", str(folder), "--json", *options)[1])
    with Engine.from_pretrained(
        folder, quantization=quantization, dtype=dtype, device="cpu", max_batch_size=2
    ) as engine:
        taken = tensor_bytes(engine.model.weights)
    assert facts["engine"]["bytes"]["weights"] == pytest.approx(taken, rel=0.05)
    assert facts["room"]["weight_bytes"] == facts["engine"]["bytes"]["weights"]


def test_info_of_what_cannot_be_made_leaves_it_out(run, folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"intermediate_size": 500}))
    facts = json.loads(run("info", str(folder), "--json")[1])
    assert [room["quantization"] for room in facts["quantized_rooms"]] == ["int8", "fp8"]
    assert "int4" not in facts["weight_bytes"]
    code, out, err = run("info", str(folder), "--quantization", "int4")
    assert (code, out) == (1, "")
    assert "quantization 'int4' has groups of 32 columns, but down has 500" in err


def test_info_of_a_quantised_checkpoint(run, folder, tmp_path):
    convert(folder, tmp_path / "int8", quantization="int8")
    facts = json.loads(run("info", str(tmp_path / "int8"), "--json", "--dtype", "bfloat16")[1])
    with Engine.from_pretrained(
        tmp_path / "int8", ops="reference", dtype="bfloat16", device="cpu"
    ) as engine:
        taken = tensor_bytes(engine.model.weights)
    assert abs(facts["weight_bytes"]["stored"] - taken) <= 0.05 * taken
    assert facts["quantized_rooms"] == []
    out = run("info", str(tmp_path / "int8"), "--check")[1]
    assert re.search(r"^weights +\S+ MB as stored, int8 and bfloat16$", out, re.MULTILINE)
    assert "names, shapes and values are right" in out
    code, out, err = run("info", str(tmp_path / "int8"), "--quantization", "fp8")
    assert (code, out) == (1, "")
    assert "is for plain checkpoints, and this one is quantised already" in err


def test_info_of_a_model_with_two_rotations(run):
    out = run("info", "gemma-3-1b")[1]
    assert "layers        26: 22 local (window 512), 4 global\n" in out
    assert "softcaps      none\n" in out
    assert "rope          base 1,000,000; local layers base 10,000\n" in out


def test_room_is_exact(set_free):
    config = PUBLISHED["gemma-2-2b"]
    weights = 4 * config.num_parameters()
    budget = weights + 6e9
    set_free(budget / 0.8)
    room = info.describe(config, torch.device("cpu"), torch.float32).room
    build = memory.Build(config, torch.device("cpu"), torch.float32, cpu)

    def size(slots: int, length: int) -> int:
        return build.estimate(slots, length).total

    assert room.weight_bytes == weights
    assert 1 < room.slots < 8
    assert size(room.slots, 8192) <= budget < size(room.slots + 1, 8192)
    for slots, length in room.longest_slot.items():
        assert size(slots, length) <= budget
        assert length == 8192 or size(slots, length + 1) > budget
    assert room.longest_slot[1] == 8192 > room.longest_slot[8] > 0


def test_a_model_larger_than_the_memory_does_not_fit(run, set_free):
    set_free(1e9)
    assert "              does not fit\n" in run("info", "gemma-2-9b", "--device", "cpu")[1]
    facts = json.loads(run("info", "gemma-2-9b", "--device", "cpu", "--json")[1])
    room = facts["room"]
    assert (room["slots"], room["longest_slot"]) == (0, {"1": 0, "8": 0})
    assert "cpu has 1.00 GB free" in facts["engine"]["problem"]
    assert facts["engine"]["problem"].endswith("no size of this model would fit")


def test_rings_are_as_long_as_the_engine_makes_them():
    parameters = inspect.signature(Engine.from_pretrained).parameters
    assert parameters["prefill_chunk"].default == info.PREFILL_CHUNK


def test_info_fetches_the_config_alone(run, folder, monkeypatch):
    asked = []

    def fetch(model, *, allow_patterns, **options):
        asked.append((model, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert run("info", "owner/name")[0] == 0
    assert asked == [("owner/name", ["config.json", "adapter_config.json"])]
    assert run("info", "owner/name", "--check")[0] == 0
    assert "*.safetensors" in asked[-1][1]


def test_a_folder_is_read_though_it_bears_the_name_of_a_published_size(run, folder, monkeypatch):
    folder.rename(folder.with_name("gemma-2b"))
    monkeypatch.chdir(folder.parent)
    assert json.loads(run("info", "gemma-2b", "--json")[1])["config"]["vocab_size"] < 256000
    assert run("info", "gemma-2b", "--check")[0] == 0


def test_check_of_a_sound_model(run):
    code, out, err = run("info", "--check")
    assert (code, err) == (0, "")
    assert out.endswith("check         names, shapes and values are right\n")
    assert json.loads(run("info", "--check", "--json")[1])["problems"] == []


def spoil(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_nan_and_infinity(tensors: dict) -> None:
    tensors["model.norm.weight"][1] = float("nan")
    tensors["model.layers.0.mlp.down_proj.weight"][2, 3] = float("-inf")


def test_check_names_every_tensor_with_nan_or_infinity(run, folder):
    spoil(folder, add_nan_and_infinity)
    code, out, err = run("info", str(folder), "--check")
    assert (code, err) == (1, "")
    assert [line for line in out.splitlines() if line.startswith("check")] == [
        f"check         {folder}: {name} holds a NaN or an infinity"
        for name in ("model.layers.0.mlp.down_proj.weight", "model.norm.weight")
    ]
    assert len(json.loads(run("info", str(folder), "--check", "--json")[1])["problems"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing", id="gone"
        ),
        pytest.param(lambda t: t.update(a=torch.ones(1)), "a is not part of the model", id="extra"),
        pytest.param(
            lambda t: t.update({"model.norm.weight": torch.ones(3)}), "is [3]", id="misshapen"
        ),
    ],
)
def test_check_finds_a_wrong_tensor(run, folder, change, message):
    spoil(folder, change)
    code, out, _ = run("info", str(folder), "--check")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("check")]
    assert message in line


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model"])
def test_check_finds_a_damaged_file_once(run, folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    code, out, _ = run("info", str(folder), "--check", "--json")
    assert code == 1
    (problem,) = json.loads(out)["problems"]
    assert name in problem


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        pytest.param([], (8, 512), id="the-engine's-defaults"),
        pytest.param(["--max-batch-size", "3", "--max-seq-len", "100"], (3, 100), id="given"),
        pytest.param(["--max-batch-size", "auto", "--max-seq-len", "auto"], (16, 512), id="auto"),
    ],
)
def test_info_shows_the_engine_that_would_be_made(run, arguments, sizes):
    code, out, err = run("info", "demo", "--json", "--device", "cpu", *arguments)
    assert (code, err) == (0, "")
    planned = json.loads(out)["engine"]
    assert (planned["max_batch_size"], planned["max_seq_len"]) == sizes
    assert planned["problem"] is None
    kinds = planned["bytes"]
    assert kinds["total"] == sum(size for kind, size in kinds.items() if kind != "total")
    values = (a if a == "auto" else int(a) for a in arguments[1::2])
    keywords = dict(zip(("max_batch_size", "max_seq_len"), values, strict=False))
    with Engine.from_pretrained("demo", device="cpu", **keywords) as engine:
        assert (engine.cache.num_slots, engine.max_seq_len) == sizes
        assert engine.cache.nbytes == kinds["kv_cache"]
    shown = run("info", "demo", "--device", "cpu", *arguments)[1]
    assert f"an engine     {sizes[0]} x {sizes[1]} tokens take " in shown


def test_info_of_an_engine_that_does_not_fit_names_what_would(run, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40 * 10**9)
    arguments = ["gemma-2-2b", "--device", "cpu", "--max-batch-size", "64"]
    code, out, err = run("info", *arguments, "--max-seq-len", "8192")
    assert (code, err) == (0, "")
    assert "an engine     64 slots of 8192 tokens need 1" in out
    assert re.search(r"but cpu has 40.00 GB free; \d+ slots of 8192 tokens or 64 slots of", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-seq-len", "0"], "max_seq_len 0 is outside 2..512"),
        (["--max-seq-len", "-3"], "max_seq_len -3 is outside 2..512"),
        (["--max-seq-len", "513"], "max_seq_len 513 is outside 2..512"),
        (["--max-batch-size", "0"], "max_batch_size 0 is outside 1..4096"),
        (["--max-batch-size", "4097"], "max_batch_size 4097 is outside 1..4096"),
    ],
)
def test_info_refuses_a_size_out_of_range(run, arguments, message):
    assert run("info", *arguments) == (1, "", f"gemcut: error: {message}\n")


def test_info_and_the_engine_have_the_same_defaults():
    parameters = inspect.signature(Engine.from_pretrained).parameters
    assert parameters["max_batch_size"].default == memory.DEFAULT_BATCH_SIZE
    assert cli._parser().parse_args(["info"]).max_batch_size == memory.DEFAULT_BATCH_SIZE
    assert parameters["max_seq_len"].default is None


@pytest.mark.parametrize("slots", ["many", "", None])
def test_slots_that_are_no_number(slots):
    with pytest.raises(ValueError, match=f"max_batch_size {slots!r} is n"):
        Engine.from_pretrained("demo", max_batch_size=slots)
