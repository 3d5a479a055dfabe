"""Flags of Megatron-SWIFT: every entry of the table is accepted with its reason, mapped or refused, in every place where settings stand."""

import json
import os
from pathlib import Path

import pytest

from swift_mega.cli import main
from swift_mega.config.load import load
from swift_mega.config.peers import ANY, PEERS
from swift_mega.config.tree import find
from swift_mega.errors import UserError

VALUES = {"bf16": ("true", "bfloat16"), "moe_router_dtype": ("fp32", "fp32")}


@pytest.mark.parametrize("name", PEERS)
def test_every_entry(name: str) -> None:
    peer = PEERS[name]
    assert find(name) is None, "a setting of ours answers to it"
    if peer.becomes is not None:
        given, ours = VALUES[name]
        setting, inside = find(peer.becomes)  # type: ignore[misc]
        section, leaf = setting.key.split(".")
        found = getattr(getattr(load(None, [], [f"--{name}", given]).run, section), leaf)
        assert (found[inside] if inside else found) == ours
        return
    good = peer.accepted is not None and ("7" if peer.accepted == ANY else peer.accepted[0])
    if good:
        resolved = load(None, [], [f"--{name}", good])
        assert resolved.run == load(None).run
        (note,) = resolved.notes
        assert note.startswith(f"--{name} ") and note.endswith(f"no effect: {peer.why}")
    if peer.accepted != ANY:
        with pytest.raises(UserError, match=f"^--{name}=other: "):
            load(None, [], [f"--{name}", "other"])


def test_a_bare_switch_takes_no_word_that_is_not_its_own(tmp_path: Path) -> None:
    flags = ["--no_save_optim", "--finetune", "true", "--no-save-rng", "--lr", "1e-5", "--modules_to_save"]
    with pytest.raises(UserError, match="--modules_to_save"):
        load(None, [], flags)
    resolved = load(None, ["save_safetensors=true"], flags[:-1])
    assert resolved.run.optim.lr == 1e-5 and len(resolved.notes) == 4
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("finetune: true\nbf16: true\ntrain:\n  steps: 3\n")
    resolved = load(str(recipe))
    assert (resolved.run.model.dtype, resolved.run.train.steps, len(resolved.notes)) == ("bfloat16", 3, 1)


def test_each_is_named_once_and_only_where_runs_are_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--finetune", "true", "--dataset_num_proc", "8", "--tuner_type", "full", "--only", "changed"]
    assert main(["megatron", "config", *words]) == 0
    said = capsys.readouterr()
    assert 'type: "full"' in said.out and "finetune" not in said.out
    assert [line.split()[0] for line in said.err.splitlines()] == ["--finetune", "--dataset_num_proc"]
    assert main(["export", "--finetune", "true"]) == 2
    assert "unknown flag --finetune" in capsys.readouterr().err


COMMANDS = os.environ.get("SWIFT_MEGA_PEER_COMMANDS", "")


@pytest.mark.skipif(not COMMANDS, reason="SWIFT_MEGA_PEER_COMMANDS names no file of the peers' command lines (JSONL)")
def test_command_lines_of_peers(capsys: pytest.CaptureFixture[str]) -> None:
    """Each sft and pt script is accepted, or refused for a feature that is named as missing."""
    rows = [json.loads(line) for line in Path(COMMANDS).read_text().splitlines()]
    unknown = []
    for row in rows:
        if row.get("verb") in ("sft", "pt") and main(["config", *row["argv"]]) == 2:
            said = capsys.readouterr().err.splitlines()[-1]
            if "unknown" in said:
                unknown.append((row["source"], said))
    assert not unknown
