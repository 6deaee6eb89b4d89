"""Which checkpoint a run goes on from, in folders as crashes, disks and file servers leave them.

Two ranks, without a model.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from ranks import run_in_processes

from vmd_scale.errors import RunFailed, UserError
from vmd_scale.files import sha256_of

FILES = ("optimizer-00000-of-00002.safetensors", "run_state.json", "weights-00000-of-00002.safetensors")


def write_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    for name in FILES:
        (checkpoint / name).write_text(f"{name} of {step}")
    written = [checkpoint / name for name in FILES]
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in written}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": step, "files": files}))
    return checkpoint


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def tear_the_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text()[:-20])


def lose_a_key(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace("sha256", "sha257", 1))


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / FILES[2]).unlink()


def lose_an_end(checkpoint: Path) -> None:
    os.truncate(checkpoint / FILES[0], 3)


def change_a_letter(checkpoint: Path) -> None:
    path = checkpoint / FILES[1]
    path.write_text(path.read_text().replace("run", "ran"))


DAMAGES = {
    lose_the_manifest: "manifest.json is missing",
    tear_the_manifest: "manifest.json is not one: JSONDecodeError",
    lose_a_key: "manifest.json is not one: KeyError: 'sha256'",
    lose_a_file: f"{FILES[2]} is missing",
    lose_an_end: f"{FILES[0]} has 3 bytes instead of 42",
    change_a_letter: f"{FILES[1]} was altered",
}


def stale(*arguments: object) -> None:
    raise OSError(errno.ESTALE, "Stale file handle")


def gone(*arguments: object) -> None:
    raise FileNotFoundError(errno.ENOENT, "No such file or directory")


# Rank, what fails there and with what.
FAULTS = {
    "no manifest": (0, "missing_or_torn", stale),
    "unreadable": (1, "altered", stale),
    "gone": (1, "altered", gone),
}


def ask(questions: list[tuple[Path, str, str]]) -> list[str]:
    """On each rank: of each folder, a question such as "go_back 8", with a fault or without; an answer or an error."""
    from vmd_scale.training import checkpoint
    from vmd_scale.training.launch import join_world, leave_world

    world = join_world()
    answers = []
    for folder, question, fault in questions:
        method, *arguments = question.split()
        checkpoints = checkpoint.Checkpointer(folder, world, None, None, 3)
        with pytest.MonkeyPatch.context() as patch:
            rank, function, failing = FAULTS.get(fault, (None, "", None))
            if rank == world.rank:
                patch.setattr(checkpoint, function, failing)
            try:
                found = getattr(checkpoints, method)(*map(int, arguments))
                if method == "resume_best":
                    answers.append(f"{checkpoints.best_bound} {checkpoints._best_name() or 'none'}")
                else:
                    answers.append("nothing" if found is None else found.name)
            except (UserError, RunFailed) as error:
                answers.append(f"{type(error).__name__}: {error}")
    leave_world()
    return answers


def answers_to(*questions: tuple[Path, str, str]) -> list[str]:
    """The same on both ranks."""
    ours, theirs = run_in_processes(ask, 2, questions)
    assert ours == theirs
    return ours


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_of_all_that_is_there_the_newest_whole_one_is_found(tmp_path):
    """Every kind of damage to the newest of three; a save that was killed and a deletion that was killed."""
    folders = [tmp_path / damage.__name__ for damage in DAMAGES]
    for folder, damage in zip(folders, DAMAGES, strict=True):
        for step in (4, 8):
            write_checkpoint(folder, step)
        damage(write_checkpoint(folder, 12))
        (folder / ".staging-step-00000016").mkdir()
        shutil.copytree(folder / "step-00000004", folder / ".staging-old-step-00000002")
        (folder / "step-00000099.copy").mkdir()  # a name that is none of ours
    nothing = tmp_path / "nothing"
    answers = answers_to(*((folder, "find_latest", "") for folder in (*folders, nothing)))
    assert answers == [*["step-00000008"] * len(folders), "nothing"]
    for folder in folders:
        wanted = ["damaged-step-00000012", "latest", "step-00000004", "step-00000008", "step-00000099.copy"]
        assert names_in(folder) == wanted
        assert (folder / "latest").read_text() == "step-00000008\n"
    assert not nothing.exists()


def test_where_nothing_is_whole_no_call_starts_anew(tmp_path, capfd):
    """The first call sets aside; the second finds only what the first left."""
    folders = [tmp_path / damage.__name__ for damage in DAMAGES]
    for folder, damage in zip(folders, DAMAGES, strict=True):
        damage(write_checkpoint(folder, 12))
    answers = answers_to(*((folder, "find_latest", "") for folder in folders * 2))
    for folder, answer in zip(folders * 2, answers, strict=True):
        assert answer.startswith(f"UserError: all checkpoints in {folder} are damaged and were set aside (damaged-step")
        assert names_in(folder) == ["damaged-step-00000012"]
    said = capfd.readouterr().err
    assert all(f"is damaged ({words}" in said for words in DAMAGES.values())


def test_what_a_rank_cannot_read_is_not_called_damaged(tmp_path):
    """Neither of two good checkpoints is touched; once the server answers, the newest is taken."""
    cases = [(question, fault) for question in ("find_latest", "go_back 12") for fault in FAULTS]
    folders = [tmp_path / str(number) for number in range(len(cases))]
    for folder in folders:
        for step in (8, 12):
            write_checkpoint(folder, step)
    failing = [(folder, *case) for folder, case in zip(folders, cases, strict=True)]
    again = [(folder, question, "") for folder, question, _ in failing]
    answers = answers_to(*failing, *again)
    for (folder, _, fault), answer in zip(failing, answers, strict=False):
        assert answer.startswith(f"RunFailed: rank {FAULTS[fault][0]} on ")
        assert f"cannot read {folder}/step-00000012 ([Errno " in answer
        assert names_in(folder) == ["latest", "step-00000008", "step-00000012"]
    assert answers[len(failing) :] == ["step-00000012"] * len(again)


def test_going_back_throws_away_what_came_after_and_sets_aside_what_is_damaged(tmp_path):
    for step in (4, 8, 12, 16):
        write_checkpoint(tmp_path, step)
    change_a_letter(tmp_path / "step-00000008")
    (tmp_path / "best").write_text("step-00000016\n")
    assert answers_to((tmp_path, "go_back 11", ""), (tmp_path, "go_back 3", "")) == ["step-00000004", "nothing"]
    assert names_in(tmp_path) == ["damaged-step-00000008", "latest", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"


def test_a_bound_is_the_best_as_long_as_its_checkpoint_is_there(tmp_path):
    """Damaged and set aside, or thrown away by going back, it must not keep the next good one from being named best."""
    kept, damaged, went_back = folders = [tmp_path / name for name in ("kept", "damaged", "went back")]
    for folder in folders:
        for step in (4, 8):
            write_checkpoint(folder, step)
        (folder / "best").write_text("step-00000008\n")
    lose_a_file(damaged / "step-00000008")
    never = tmp_path / "never"
    write_checkpoint(never, 4)
    questions = [(damaged, "find_latest", ""), (went_back, "go_back 5", "")]
    questions += [(folder, "resume_best 3", "") for folder in (kept, damaged, went_back, never)]
    assert answers_to(*questions)[2:] == ["3 step-00000008", "inf none", "inf none", "inf none"]
    assert [folder.name for folder in folders if (folder / "best").exists()] == ["kept"]
