"""examples/serving/node against the Python runner and the Python tokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytestmark = [pytest.mark.runtimes, pytest.mark.slow]

PROMPT = [1, 9, 4, 17, 23]
SCALES = (0, 0.5, 1)
NEW_TOKENS = 24
TEXTS = (
    "",
    "Tom found a red kite near the river. He felt",
    "  two  spaces,\ttab,\nand\r\nlines \n",
    "DON'T we'll they've I'm 'quoted' 12,345.67 §5 x²",
    "naïve café, Ærøskøbing, cafe\u0301",
    "日本語のテキスト、中文 한국어",
    "שלום عليكم हिन्दी ไทย",
    "🙂 👩\u200d👩\u200d👧 🏳️\u200d🌈 🇪🇺",
    "a</s>b <s> <unk> <pad>",
    "\u00a0nbsp\u2003em\u200bzero\ufeffbom\u0001control",
)


def answer(done: Any) -> Any:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize("rank", [0, 1], ids=["fitted", "adaptive"])
def test_tokens_are_those_of_python(rank: int, tiny: Any, generate: Any) -> None:
    served = tiny(rank)
    found = {}
    for scale in SCALES:
        result = answer(
            generate(
                *(served.folder, "--ids", ",".join(map(str, PROMPT)), "--json"),
                *("--scale", scale, "--tokens", NEW_TOKENS),
            )
        )
        assert result["prompt_ids"] == PROMPT
        assert result["ids"] == served.tokens(PROMPT, NEW_TOKENS, scale)
        found[scale] = result["ids"]
    assert len(found[0]) > 4
    assert len({tuple(ids) for ids in found.values()}) == len(SCALES)


def test_strength_below_zero_and_by_default(tiny: Any, generate: Any) -> None:
    served = tiny(0)
    start = (served.folder, "the day Tom", "--tokens", 8, "--json")
    weakened = answer(generate(*start, "--scale=-0.5"))
    expected = served.tokens(weakened["prompt_ids"], 8, -0.5)
    assert weakened["ids"] == expected
    assert answer(generate(*start)) == answer(generate(*start, "--scale", 1))
    assert answer(generate(*start))["ids"] != expected


def test_text_ends_at_the_stop_token(tiny: Any, generate: Any, tmp_path: Path) -> None:
    served = tiny(0)
    folder = tmp_path / "model"
    shutil.copytree(served.folder, folder)
    expected = served.tokens(PROMPT, NEW_TOKENS, 1)
    # The first token that is not like those before it, so that it ends the text there.
    stop = next(i for i in range(2, len(expected)) if expected[i] not in expected[:i])
    settings = json.dumps({"eos_token_id": [0, expected[stop]]})
    (folder / "generation_config.json").write_text(settings)
    result = answer(generate(folder, "--ids", "1,9,4,17,23", "--json"))
    assert result["ids"] == expected[: stop + 1]


def test_text_stays_within_the_context(tiny: Any, generate: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny(0).folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 9}))
    result = answer(generate(folder, "--ids", "1,9,4,17,23", "--tokens", 20, "--json"))
    assert result["ids"] == tiny(0).tokens(PROMPT, 4, 1)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokenizer_is_that_of_python(text: str, demo: Any, generate: Any) -> None:
    result = answer(generate(demo.folder, "--tokens", 0, "--json", "--", text))
    expected = demo.tokenizer(text)["input_ids"]
    assert result["prompt_ids"] == expected
    assert result["ids"] == []
    assert result["text"] == demo.decode(expected)


@pytest.mark.shared
def test_sentencepiece_tokenizer_is_that_of_python(
    shared: Path, demo: Any, generate: Any, tmp_path: Path
) -> None:
    from austeer.adapters import load_tokenizer

    source = shared / "models" / "stories260K"
    shutil.copytree(demo.folder, folder := tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    tokenizer = load_tokenizer(str(source))
    for text in TEXTS[1:-1]:
        result = answer(generate(folder, "--tokens", 0, "--json", "--", text))
        assert result["prompt_ids"] == tokenizer(text)["input_ids"]
        assert result["text"] == tokenizer.decode(
            result["prompt_ids"], skip_special_tokens=True
        )


def test_tokenizer_that_the_library_mistakes_is_refused(
    tiny: Any, tiny_tokenizer: Any, generate: Any, tmp_path: Path
) -> None:
    shutil.copytree(tiny(0).folder, folder := tmp_path / "model")
    tiny_tokenizer.save_pretrained(folder)
    check_refused(generate(folder, "the day"), "its model is 'WordLevel', expected BPE")


def test_prompt_without_tokens_is_refused(tiny: Any, generate: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny(0).folder, folder := tmp_path / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "post_processor": None}))
    check_refused(generate(folder, ""), "the prompt has no tokens")
    assert answer(generate(folder, "Tom", "--json"))["prompt_ids"][0] != 1


def test_another_tokenizer_is_that_of_python(tiny: Any, generate: Any) -> None:
    served, prompt = tiny(0), "the day  Tom felt very happy. Unheard 12!"
    result = answer(generate(served.folder, prompt, "--tokens", 6, "--json"))
    assert result["prompt_ids"] == served.tokenizer(prompt)["input_ids"]
    assert served.tokenizer.unk_token_id in result["prompt_ids"]
    assert result["text"] == served.text(prompt, 6, 1)


def test_growing_text_is_the_whole_text(demo: Any, generate: Any) -> None:
    smile = demo.tokenizer("Tom 🙂")["input_ids"]
    for ids in (smile, smile[:-1], smile[:-2]):
        # Where the prompt ends inside a character, its bytes must not be printed one by one.
        arguments = (demo.folder, "--ids", ",".join(map(str, ids)), "--tokens", 12)
        whole = answer(generate(*arguments, "--json"))
        assert whole["ids"] == demo.tokens(ids, 12, 1)
        assert whole["text"] == demo.decode(ids + whole["ids"])
        growing = generate(*arguments)
        assert growing.stdout == whole["text"] + "\n"
        assert growing.stderr == ""
    assert "\ufffd" in whole["text"]


SETTLED = """
import { readFileSync } from 'node:fs';
import { Tokenizer } from '@huggingface/tokenizers';
import { loadText, Transcript } from '../common/text.mjs';

const [folder, ids] = process.argv.slice(1);
const readJson = async (name) => JSON.parse(readFileSync(`${folder}/${name}`, 'utf8'));
const { tokenizer } = await loadText(readJson, Tokenizer);
const transcript = new Transcript(tokenizer, []);
const settled = JSON.parse(ids).map((id) => (transcript.push(id), transcript.settled));
console.log(JSON.stringify(settled));
"""


def test_characters_appear_whole(demo: Any, node: str, generate: Any) -> None:
    ids = demo.tokenizer("a 🙂é")["input_ids"]
    command = [node, "--input-type=module", "-e", SETTLED, str(demo.folder), json.dumps(ids)]
    folder = Path(__file__).resolve().parents[2] / "examples" / "serving" / "node"
    done = subprocess.run(
        command, cwd=folder, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    settled = json.loads(done.stdout)
    assert len(settled) == len(ids)
    assert sorted(set(settled), key=len) == ["", "a", "a ", "a 🙂", "a 🙂é"]
    assert settled == sorted(settled, key=len)


def test_fixed_strength(tiny: Any, generate: Any, tmp_path: Path) -> None:
    folder = tiny(0).fixed_folder(tmp_path / "fixed")
    arguments = (folder, "--ids", "1,9,4,17,23", "--tokens", 8, "--json")
    for scale in (0, 0.5):
        check_refused(generate(*arguments, "--scale", scale), "no steering_scale input")
    result = answer(generate(*arguments, "--scale", 1))
    assert result["ids"] == tiny(0).tokens(PROMPT, 8, 1)


def count_positions_inside(path: Path) -> None:
    """Take the input `position_ids` away: positions come from the mask."""
    model = onnx.load(path)
    graph, make = model.graph, onnx.helper.make_node
    graph.input.remove(next(item for item in graph.input if item.name == "position_ids"))
    constants = {"one": 1, "axis": [1], "end": [1 << 40]}
    for name, value in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), f"at.{name}"))
    nodes = [
        make("CumSum", ["attention_mask", "at.one"], ["at.count"]),
        make("Sub", ["at.count", "at.one"], ["at.all"]),
        make("Shape", ["input_ids"], ["at.fresh"], start=1),
        make("Neg", ["at.fresh"], ["at.start"]),
        make("Slice", ["at.all", "at.start", "at.end", "at.axis"], ["position_ids"]),
    ]
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    onnx.save(model, path)


def test_model_that_counts_its_positions(tiny: Any, generate: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny(0).folder, folder := tmp_path / "model")
    count_positions_inside(folder / "model.onnx")
    result = answer(generate(folder, "--ids", "1,9,4,17,23", "--tokens", NEW_TOKENS, "--json"))
    assert result["ids"] == tiny(0).tokens(PROMPT, NEW_TOKENS, 1)


def test_weights_in_a_file_of_their_own(tiny: Any, generate: Any, tmp_path: Path) -> None:
    folder = tiny(0).split_folder(tmp_path / "model")
    ids = ("--ids", "1,9,4,17,23", "--tokens", NEW_TOKENS, "--json")
    assert answer(generate(folder, *ids))["ids"] == tiny(0).tokens(PROMPT, NEW_TOKENS, 1)
    (folder / "model.onnx.data").unlink()
    check_refused(generate(folder, *ids), "model.onnx.data")


def check_refused(done: Any, message: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("generate.mjs: ")
    assert message in done.stderr


def write_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


BREAKS = {
    "no model": (lambda f: (f / "model.onnx").unlink(), "doesn't exist"),
    "truncated": (lambda f: write_half(f / "model.onnx"), "Protobuf parsing failed"),
    "empty model": (lambda f: (f / "model.onnx").write_bytes(b""), "cannot load this model"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "truncated tokenizer": (lambda f: write_half(f / "tokenizer.json"), "cannot read this"),
    "another tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "BPE"}}'),
        "cannot use this tokenizer",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_folder(name: str, tiny: Any, generate: Any, tmp_path: Path) -> None:
    damage, message = BREAKS[name]
    shutil.copytree(tiny(0).folder, folder := tmp_path / "model")
    damage(folder)
    check_refused(generate(folder, "the day"), message)


def test_missing_folder(generate: Any, tmp_path: Path) -> None:
    check_refused(generate(tmp_path / "none", "the day"), "none: no such folder")
    check_refused(generate(__file__, "the day"), "test_node.py: no such folder")


def test_another_kind_of_model(tiny: Any, generate: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny(0).folder, folder := tmp_path / "model")
    x = ir.val("pixels", ir.DataType.FLOAT, [1])
    node = ir.node("Neg", [x])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18}, name="other")
    node.outputs[0].name = "mask"
    node.outputs[0].dtype = ir.DataType.FLOAT
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx")
    done = generate(folder, "the day")
    check_refused(done, "past_key_values.0.key, logits; unknown: pixels")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "much", "the"], "--scale: expected a number, got 'much'"),
        (["--scale", "-1", "the"], "--scale=-XYZ"),
        (["--scale", "Infinity", "the"], "--scale: expected a number"),
        (["--tokens", "1.5", "the"], "--tokens: expected a whole number"),
        (["--ids", "1,,2"], "--ids: expected a number, got ''"),
        (["--ids", "1,2", "the"], "expected FOLDER and either a prompt or --ids"),
        ([], "expected FOLDER and either a prompt or --ids"),
        (["--colour", "red", "the"], "Unknown option '--colour'"),
        (["--ids", "1,99999"], "out of data bounds"),
        (
            ["--ids", ",".join(["5"] * 128)],
            "the prompt has 128 tokens, the model's context 128",
        ),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tiny: Any, generate: Any) -> None:
    check_refused(generate(tiny(0).folder, *arguments), message)


def test_margins_are_wide_enough_to_compare_tokens(tiny: Any, demo: Any) -> None:
    """Guards this file: a near tie would make equal tokens a matter of luck."""
    from austeer.graphs import OnnxCausalLM

    for served in (tiny(0), tiny(1)):
        for scale in SCALES:
            ids = PROMPT + served.tokens(PROMPT, NEW_TOKENS, scale)
            path = served._fixed(scale) if scale else served.base
            logits = OnnxCausalLM(path, threads=1).logits(np.array([ids]))[0, len(PROMPT) - 1 :]
            best = np.sort(logits, axis=-1)[:, -2:]
            assert (best[:, 1] - best[:, 0]).min() > 1e-3
