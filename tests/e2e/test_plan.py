"""The launcher that plans: text and JSON say the same, and bad input ends with code 2."""

import json


def test_a_plan_in_words_and_numbers(lab, tmp_path):
    file = tmp_path / "plan.json"
    done = lab.launch("plan", "--config", lab.config, "--gpus", 16, "--gpu", "h200", "--zero", 2, "--json", file)
    assert done.code == 0, done.text
    found = json.loads(file.read_text())
    assert f"{found['parameters']['denoiser']:,}" in done.text
    assert list(found["zero_stages"]) == ["0", "1", "2", "3"]
    assert found["expected"]["gpus"] == 16
    assert found["gpu"]["name"] == "h200"
    assert found["tokens"] > 0
    (configured,) = (line for line in done.text.splitlines() if "configured" in line)
    assert configured.startswith("2 ")
    assert [point["gpus"] for point in found["curve"]][-1] >= 4096


def test_several_configurations_are_put_side_by_side(lab, tmp_path):
    file, other = tmp_path / "plans.json", tmp_path / "other.json"
    other.write_text(json.dumps({"base": str(lab.config), "latent": {"width": 0}}))
    done = lab.launch("plan", "--config", lab.config, other, "--gpus", 4, "--json", file)
    assert done.code == 0, done.text
    found = json.loads(file.read_text())
    assert list(found) == [str(lab.config), str(other)]
    assert [plan["parameters"]["encoder"] > 0 for plan in found.values()] == [True, False]
    assert all(any(line.startswith(name) for line in done.text.splitlines()) for name in found)


def test_bad_input_is_named(lab):
    for arguments, named in ((("--gpus", 0), "--gpus 0"), (("--mfu", 2), "--mfu 2"), (("--zero", 4), "--zero")):
        done = lab.launch("plan", "--config", lab.config, *arguments)
        assert done.code == 2
        assert named in done.text
