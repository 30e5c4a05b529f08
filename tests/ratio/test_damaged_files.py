"""A flipped bit, a cut file, a killed write: simulations are read as they were written, or not at all."""

import numpy as np
import pytest
from jax import random

from numpyro_smc.engines.checkpoint import replacing
from numpyro_smc.ratio.stored_data import StoredData, write

KEY = random.key(0)
QUIET = {"progress_bar": False}


def simulate(rng_key, num):
    theta = np.asarray(random.normal(rng_key, (num, 2)))
    return theta, theta[:, :, None] * 2, theta[:, :1] + 1


def contents(data):
    found = data.first(10**6)
    return [found.theta, found.x, found.context, found.failed]


@pytest.mark.parametrize("file_format", ["npz", "hdf5"])
def test_every_flipped_bit_is_found_or_changes_nothing(file_format, tmp_path):
    def simulate_some(rng_key, num):
        theta, x, context = simulate(rng_key, num)
        return theta, np.where(theta[:, :1, None] < -1, np.nan, x), context

    options = {"file_format": file_format, "part_size": 40, "nonfinite": "drop", **QUIET}
    right = contents(write(tmp_path, simulate_some, KEY, 80, **options))
    file = sorted(tmp_path.glob("part_*"))[0]
    whole, rng, num_found = file.read_bytes(), np.random.default_rng(1), 0
    for position in rng.integers(0, 8 * len(whole), 150):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << position % 8
        file.write_bytes(broken)
        try:
            found = contents(StoredData(tmp_path, nonfinite="drop"))
        except ValueError as error:
            assert "damaged" in str(error) or "must have arrays" in str(error)
            num_found += 1
        else:
            for one, other in zip(found, right, strict=True):
                np.testing.assert_array_equal(one, other)
    assert num_found > 20
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"part_00000.* is damaged.* Delete it; simulate_to or write"):
        contents(StoredData(tmp_path, nonfinite="drop"))
    file.unlink()
    for one, other in zip(contents(write(tmp_path, simulate_some, KEY, 80, **options)), right, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_part_without_its_checksum_is_none_of_ours(tmp_path):
    write(tmp_path, simulate, KEY, 20, **QUIET)
    theta, x, context = simulate(KEY, 20)
    np.savez(tmp_path / "part_00000.npz", theta=theta, x=x, context=context, num_asked_for=np.array(20))
    with pytest.raises(ValueError, match="its contents are not those of its checksum"):
        StoredData(tmp_path).first(5)


def test_damaged_settings_are_said(tmp_path):
    write(tmp_path, simulate, KEY, 20, **QUIET)
    (tmp_path / "settings.json").write_text('{"rng_key": [0, ')
    with pytest.raises(ValueError, match=r"settings\.json' is damaged"):
        write(tmp_path, simulate, KEY, 40, **QUIET)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match=r"settings\.json' holds no settings"):
        StoredData(tmp_path)


def test_what_a_killed_write_left_is_swept(tmp_path):
    write(tmp_path, simulate, KEY, 20, part_size=20, **QUIET)
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "part_00001.npz") as temporary:
        left_over = temporary.name  # the name that a killed write would leave behind
        raise ZeroDivisionError
    (tmp_path / left_over).write_bytes(b"half of it")
    assert len(write(tmp_path, simulate, KEY, 40, part_size=20, **QUIET)) == 40
    assert sorted(file.name for file in tmp_path.iterdir()) == ["part_00000.npz", "part_00001.npz", "settings.json"]


def test_a_full_disk_keeps_the_parts_before(tmp_path, monkeypatch):
    saved = np.savez
    calls = []

    def full(*args, **arrays):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        saved(*args, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, simulate, KEY, 80, part_size=20, **QUIET)
    assert sorted(file.name for file in tmp_path.glob("*part*")) == ["part_00000.npz", "part_00001.npz"]
    assert len(write(tmp_path, simulate, KEY, 80, part_size=20, **QUIET)) == 80


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_simulated(tmp_path, monkeypatch):
    def never(rng_key, num):
        raise AssertionError

    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"'.*file' is a file; name a folder"):
        write(tmp_path / "file", never, KEY, 20, **QUIET)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="cannot be written; change its permissions"):
        write(tmp_path / "folder", never, KEY, 20, **QUIET)
