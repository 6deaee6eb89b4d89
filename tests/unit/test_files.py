import pytest

from vmd_scale.errors import UserError
from vmd_scale.files import check_writable, write_json


def test_what_can_be_written_is_known_before_and_nothing_is_made(tmp_path):
    for path in (None, tmp_path / "new.json", tmp_path / "a" / "b" / "new.json"):
        check_writable(path, "--json")
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "file.json", {})
    check_writable(tmp_path / "file.json", "--json")  # would be replaced
    with pytest.raises(UserError, match=rf"--json {tmp_path}: is a folder"):
        check_writable(tmp_path, "--json")
    with pytest.raises(UserError, match=r"file\.json is not a folder"):
        check_writable(tmp_path / "file.json" / "new.json", "--json")
