"""Tables of benchmarks are whole, or those of before."""

import pytest

from benchmarks import report


def test_a_write_that_fails_leaves_the_table_of_before(tmp_path, monkeypatch):
    report.write(tmp_path, "table", [{"cell": 1}], {"a": 1})
    before = [(tmp_path / name).read_text() for name in ("table.csv", "table.json")]

    class Broken:
        def __str__(self):
            raise KeyboardInterrupt

    for rows in ([{"cell": 2}, {"cell": Broken()}], [{"cell": 2, "other": Broken()}]):
        with pytest.raises(KeyboardInterrupt):
            report.write(tmp_path, "table", rows, {"a": 1})
    assert [(tmp_path / name).read_text() for name in ("table.csv", "table.json")] == before
    assert report.load(tmp_path, "table", {"a": 1}) == [{"cell": 1}]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["table.csv", "table.json"]
