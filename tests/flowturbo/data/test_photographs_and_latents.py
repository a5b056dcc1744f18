"""Photographs in folders, their crops and their cached latents."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from training_data import make_cache, small_vae, write_photographs

from flowturbo.data.latents import (
    CachedLatents,
    CacheManifest,
    LatentSource,
    OnTheFlyLatents,
    build_cache,
    read_cache_manifest,
)
from flowturbo.data.photographs import (
    Photographs,
    centre_crop,
    list_photographs,
    load_imagenet_indices,
    normalise_pixels,
    select_classes,
    to_pixels,
)
from runtime.system.errors import DataError
from runtime.system.files import write_json


def test_the_table_holds_imagenet() -> None:
    indices = load_imagenet_indices()
    assert len(indices) == 1000
    assert sorted(indices.values()) == list(range(1000))
    assert (indices["n02099601"], indices["n01440764"]) == (207, 0)


def test_wnid_folders_get_imagenet_indices(tmp_path: Path) -> None:
    listing = list_photographs(write_photographs(tmp_path, ("n02099601", "n02086240")))
    assert listing.labels == (155,) * 4 + (207,) * 4
    assert listing.names == {155: "n02086240", 207: "n02099601"}


def test_other_folders_get_labels_in_name_order(tmp_path: Path) -> None:
    listing = list_photographs(write_photographs(tmp_path, ("pear", "apple")))
    assert listing.names == {0: "apple", 1: "pear"}


def test_fraction_is_per_class_and_seeded(tmp_path: Path) -> None:
    write_photographs(tmp_path, ("a", "b"), count=10)
    half = list_photographs(tmp_path, fraction=0.5)
    assert half.labels == (0,) * 5 + (1,) * 5
    assert half == list_photographs(tmp_path, fraction=0.5)
    assert half.paths != list_photographs(tmp_path, fraction=0.5, seed=1).paths
    assert len(list_photographs(tmp_path, fraction=0.001)) == 2


def test_classes_by_name_or_label(tmp_path: Path) -> None:
    write_photographs(tmp_path, ("a", "b", "c"))
    assert set(list_photographs(tmp_path, classes=["b", "2"]).labels) == {1, 2}


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (lambda root: root / "absent", {}, "no data folder"),
        (lambda root: root, {}, "no class folders"),
        (lambda root: write_photographs(root, ("n02099601", "pear")), {}, "mixes ImageNet folders with pear"),
        (lambda root: write_photographs(root, ("a",)), {"classes": ["z"]}, "no class z"),
        (lambda root: write_photographs(root, ("a",)), {"fraction": 0.0}, "--fraction is 0.0"),
        (lambda root: write_photographs(root, ("a",), count=0), {}, "no photographs"),
    ],
)
def test_bad_data_is_said_with_what_to_do(tmp_path: Path, make, options, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=said) as caught:
        list_photographs(make(tmp_path), **options)
    assert caught.value.allowed
    assert caught.value.remedy


def test_centre_crop_takes_the_middle() -> None:
    image = Image.new("RGB", (60, 20), (0, 0, 0))
    image.paste((255, 255, 255), (20, 0, 40, 20))
    assert centre_crop(image, 20).min() == 255
    assert centre_crop(image, 8).shape == (8, 8, 3)
    assert centre_crop(image.convert("L"), 30).shape == (30, 30, 3)


def test_pixels_survive_the_unit_range() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(to_pixels(normalise_pixels(pixels)), pixels)


def test_a_corrupt_file_is_counted_and_replaced(tmp_path: Path) -> None:
    write_photographs(tmp_path, ("a", "b"))
    (tmp_path / "a" / "1.png").write_bytes(b"not a picture")
    photographs = Photographs(list_photographs(tmp_path), 16)
    pixels, labels = photographs.read_batch([0, 1, 2])
    assert np.array_equal(pixels[1], pixels[2])
    assert labels.tolist() == [0, 0, 0]
    assert [path.name for path in photographs.corrupt] == ["1.png"]


def test_only_corrupt_files_are_an_error(tmp_path: Path) -> None:
    write_photographs(tmp_path, ("a",), count=1)
    (tmp_path / "a" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 1 photographs"):
        Photographs(list_photographs(tmp_path), 16).read_batch([0])


def posterior(source: LatentSource, rows: Any, mirrored: bool, noise: torch.Tensor) -> torch.Tensor:
    """Latents of some items, all upright or all mirrored."""
    return source.sample(source.read(np.asarray(rows), np.full(len(rows), mirrored))[0], noise)


def test_cached_latents_are_posterior_samples_of_both_sides(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "data", ("a", "b"))
    (root / "a" / "1.png").write_bytes(b"cut")
    latents = make_cache(root, tmp_path / "cache")
    assert latents.manifest.shape == (4, 4, 4)
    assert latents.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert [Path(p).name for p in latents.manifest.corrupt] == ["1.png"]
    rows, zero = range(7), torch.zeros(7, 4, 4, 4)
    upright, mirrored = (posterior(latents, rows, side, zero) for side in (False, True))
    drawn = posterior(latents, rows, False, torch.ones_like(zero))
    assert not torch.equal(upright, mirrored)
    assert bool((drawn > upright).all())


def test_interrupted_caching_goes_on(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "data", ("a", "b"))
    first = make_cache(root, tmp_path / "cache")
    shards = sorted((tmp_path / "cache").glob("*.safetensors"))
    kept = shards[0].stat().st_mtime_ns
    noise = torch.zeros(8, 4, 4, 4)
    before = posterior(first, range(8), False, noise)
    shards[1].unlink()
    interrupt(tmp_path / "cache")
    again = make_cache(root, tmp_path / "cache")
    assert shards[0].stat().st_mtime_ns == kept
    assert torch.equal(before, posterior(again, range(8), False, noise))


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_damaged_shard_is_made_again_and_the_others_are_kept(tmp_path: Path, interrupted: bool) -> None:
    root = write_photographs(tmp_path / "data", ("a", "b"))
    make_cache(root, tmp_path / "cache")
    first, second, *_ = sorted((tmp_path / "cache").glob("*.safetensors"))
    whole, kept = second.read_bytes(), first.stat().st_mtime_ns
    second.write_bytes(whole[:-7])
    if interrupted:
        interrupt(tmp_path / "cache")
    else:
        with pytest.raises(DataError, match="damaged one") as raised:
            CachedLatents(tmp_path / "cache")
        assert "writes that shard again" in raised.value.remedy
    make_cache(root, tmp_path / "cache")
    assert second.read_bytes() == whole
    assert first.stat().st_mtime_ns == kept


def test_a_class_folder_without_photographs_is_said(tmp_path: Path) -> None:
    root = write_photographs(tmp_path, ("a", "b"))
    (root / "c" / "1.png").mkdir(parents=True)  # as empty as a folder that may not be read
    with pytest.warns(UserWarning, match=f"no photographs in {root / 'c'}"):
        listing = list_photographs(root)
    assert set(listing.labels) == {0, 1}


def interrupt(cache: Path) -> None:
    """Leaves the manifest as an interrupted call does."""
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "corrupt": [], "complete": False}))


def test_a_resumed_cache_still_knows_of_earlier_corrupt_files(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "data", ("a", "b"))
    (root / "a" / "1.png").write_bytes(b"cut")
    make_cache(root, tmp_path / "cache")
    (root / "a" / "1.png").touch()  # nothing is read again
    interrupt(tmp_path / "cache")
    assert [Path(p).name for p in make_cache(root, tmp_path / "cache").manifest.corrupt] == ["1.png"]


def test_a_shard_of_corrupt_files_is_empty_and_no_end(tmp_path: Path) -> None:
    """Of shards of three, the middle one; the rows around it are where they were."""
    root = write_photographs(tmp_path / "data", ("a", "b"))
    whole = make_cache(root, tmp_path / "whole")
    for bad in ("a/3.png", "b/0.png", "b/1.png"):
        (root / bad).write_bytes(b"cut")
    latents = make_cache(root, tmp_path / "cache")
    assert latents.labels.tolist() == [0, 0, 0, 1, 1]
    assert len(latents.manifest.corrupt) == 3
    noise = torch.zeros(5, 4, 4, 4)
    expected = posterior(whole, [0, 1, 2, 6, 7], False, noise)
    torch.testing.assert_close(posterior(latents, range(5), False, noise), expected, rtol=1e-2, atol=1e-2)


def test_a_cache_of_nothing_is_an_error(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "data", ("a",), count=1)
    (root / "a" / "0.png").write_bytes(b"cut")
    with pytest.raises(DataError, match="none of the 1 photographs"):
        make_cache(root, tmp_path / "cache")


def test_processes_share_the_shards(tmp_path: Path) -> None:
    """Two of them, one after the other here: the first waits at the end, so it is stopped there and comes again."""
    photographs = Photographs(list_photographs(write_photographs(tmp_path / "data", ("a", "b"))), 16)
    whole = make_cache(tmp_path / "data", tmp_path / "whole")

    def build(process: int, waits: int) -> None:
        left = iter(range(waits))

        def wait() -> None:
            if next(left, None) is None:
                raise InterruptedError

        with contextlib.suppress(InterruptedError):
            build_cache(
                tmp_path / "cache", photographs, small_vae(), "test", shard=3, process=process, processes=2, wait=wait
            )

    build(0, 1)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    build(1, 1)
    build(0, 3)
    noise = torch.zeros(8, 4, 4, 4)
    parts = [posterior(source, range(8), True, noise) for source in (whole, CachedLatents(tmp_path / "cache"))]
    assert torch.equal(*parts)


def test_a_part_of_a_cache_is_the_part_of_the_photographs(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "data", ("a", "b", "c"))
    part = {"fraction": 0.5, "classes": ["b", "c"], "seed": 3}
    make_cache(root, tmp_path / "cache")
    taken, alone = CachedLatents(tmp_path / "cache", **part), make_cache(root, tmp_path / "part", **part)
    assert taken.labels.tolist() == alone.labels.tolist() == [1, 1, 2, 2]
    noise = torch.zeros(4, 4, 4, 4)
    assert torch.equal(posterior(taken, range(4), False, noise), posterior(alone, range(4), False, noise))
    assert taken.describe()["fraction"] == alone.manifest.fraction == 0.5
    with pytest.raises(DataError, match="no class z"):
        CachedLatents(tmp_path / "cache", classes=["z"])


def test_photographs_encoded_on_the_fly_are_those_of_a_cache(tmp_path: Path) -> None:
    """But for the cache's 16 bits."""
    root = write_photographs(tmp_path / "data", ("a", "b"))
    latents = make_cache(root, tmp_path / "cache")
    live = OnTheFlyLatents(Photographs(list_photographs(root), 16), small_vae(), "test")
    noise = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for mirrored in (False, True):
        torch.testing.assert_close(
            posterior(live, range(8), mirrored, noise),
            posterior(latents, range(8), mirrored, noise),
            rtol=2e-3,
            atol=2e-3,
        )
    assert live.manifest.shape == latents.manifest.shape


def test_a_cache_is_mapped_not_read(tmp_path: Path) -> None:
    """The tensors of a shard lie in its file: closing over 64 MB of them takes next to no memory."""
    path = tmp_path / "latents-00000000.safetensors"
    n = 4096
    parts = {"mean": torch.zeros(n, 2, 4, 32, 32, dtype=torch.float16), "label": torch.zeros(n, dtype=torch.int64)}
    save_file({**parts, "std": torch.zeros(n, 2, 4, 1, 1, dtype=torch.float16)}, path)
    manifest = CacheManifest("d", 256, "test", 1.0, (4, 32, 32), n, n, names={"0": "a"}, complete=True)
    write_json(tmp_path / "manifest.json", asdict(manifest))
    del parts
    before = resident_bytes()
    latents = CachedLatents(tmp_path)
    assert len(latents) == n
    assert resident_bytes() - before < 0.1 * path.stat().st_size


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_bad_caches_are_said(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "data", ("a", "b"))
    make_cache(root, tmp_path / "cache")
    with pytest.raises(DataError, match="is not a latent cache"):
        read_cache_manifest(tmp_path)
    with pytest.raises(DataError, match="something else: seed differ"):
        make_cache(root, tmp_path / "cache", seed=1)
    next((tmp_path / "cache").glob("*.safetensors")).write_bytes(b"cut")
    with pytest.raises(DataError, match="damaged"):
        CachedLatents(tmp_path / "cache")


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_replaced_photograph_makes_a_cache_stale(tmp_path: Path, interrupted: bool) -> None:
    root = write_photographs(tmp_path / "data", ("a", "b"))
    cache = tmp_path / "cache"
    make_cache(root, cache)
    before = {path: path.read_bytes() for path in cache.iterdir()}
    make_cache(root, cache)  # nothing has changed
    assert {path: path.read_bytes() for path in cache.iterdir()} == before
    if interrupted:
        interrupt(cache)
    replaced = root / "a" / "1.png"
    shutil.copy(root / "b" / "2.png", replaced)
    with pytest.raises(DataError, match="have changed since") as caught:
        make_cache(root, cache)
    assert str(replaced) in caught.value.given
    assert "same sizes and times" in caught.value.allowed
    assert f"remove {cache}" in caught.value.remedy
    shutil.rmtree(cache)  # what the message says
    make_cache(root, cache)


@pytest.mark.parametrize("kept", ["time", "size"])
def test_size_or_time_alone_is_enough(tmp_path: Path, kept: str) -> None:
    root = write_photographs(tmp_path / "data", ("a",))
    make_cache(root, tmp_path / "cache")
    photograph = root / "a" / "1.png"
    status, content = photograph.stat(), photograph.read_bytes()
    photograph.write_bytes(content + b"\0" * (kept == "time"))
    nanoseconds = status.st_mtime_ns - (kept == "size") * 10**9  # an older file, as `cp -p` brings it
    os.utime(photograph, ns=(nanoseconds, nanoseconds))
    with pytest.raises(DataError, match="have changed since"):
        make_cache(root, tmp_path / "cache")


def test_a_cache_of_an_earlier_version_goes_on_and_warns(tmp_path: Path) -> None:
    root = write_photographs(tmp_path / "data", ("a",))
    make_cache(root, tmp_path / "cache")
    for shard in (tmp_path / "cache").glob("*.safetensors"):
        tensors = {name: tensor for name, tensor in load_file(shard).items() if name != "stamps"}
        save_file(tensors, shard, metadata={"skipped": "[]"})
    make_cache(root, tmp_path / "cache")  # no warning, which would be an error here
    later = max(path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()) + 10**9
    os.utime(root / "a" / "1.png", ns=(later, later))
    with pytest.warns(UserWarning, match="1 photographs are newer than their latents"):
        make_cache(root, tmp_path / "cache")


def write_class_folders(root: Path, names: Any) -> Path:
    """Write one grey picture per class folder, as bright as the place of its name."""
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("L", (16, 16), 10 * place).save(root / name / "0.png")
    return root


def test_folders_named_by_numbers_are_in_number_order(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path, [str(i) for i in range(12)])
    listing = list_photographs(root)
    assert listing.names == {i: str(i) for i in range(12)}
    assert [int(path.parent.name) for path in listing.paths] == list(listing.labels)
    assert set(list_photographs(root, classes=["10"]).names.values()) == {"10"}
    padded = write_class_folders(tmp_path / "padded", [f"{i:03}" for i in range(11)])
    assert list_photographs(padded, classes=["2"]).names == {2: "002"}


def test_numbers_that_are_not_the_labels_are_said_and_never_guessed(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path, [str(i) for i in range(1, 12)])
    with pytest.warns(UserWarning, match="folder 1 has label 0"):
        names = list_photographs(root).names
    assert names == {i: str(i + 1) for i in range(11)}
    with pytest.raises(DataError, match=r"folder 2 \(label 1\) or the label 2 \(folder 3\)") as caught:
        select_classes(names, ["2"], root)
    assert caught.value.allowed
    assert "2/ or 3/" in caught.value.remedy
    assert select_classes(names, ["2/", "11"], root) == {1: "2", 10: "11"}


def test_folders_of_a_zip_from_a_mac_are_no_class(tmp_path: Path) -> None:
    root = write_photographs(tmp_path, ("cats", "dogs"))
    for name in ("__MACOSX/cats/._0.png", "cats/._0.png", ".cache/x.png", "@eaDir/x.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0\5\26\7")
    listing = list_photographs(root)
    assert listing.names == {0: "cats", 1: "dogs"}
    assert len(listing) == 8


def test_16_bit_photographs_keep_their_greys(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.tile(np.arange(64, dtype=np.uint16) * 1000, (64, 1))).save(tmp_path / "a" / "0.png")
    pixels, _ = Photographs(list_photographs(tmp_path), 64).read_batch([0])
    assert np.array_equal(pixels[0, 0, :, 0], np.arange(64) * 1000 >> 8)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 4000)])
def test_a_thin_picture_takes_no_gigabytes(size: tuple[int, int]) -> None:
    """1 × 60 000 pixels, 312 bytes as PNG, were enlarged to 256 × 15 million."""
    assert centre_crop(Image.new("RGB", size, (10, 20, 30)), 256)[128, 128].tolist() == [10, 20, 30]
    grey = Image.fromarray(np.full(size[::-1], 0x8000, np.uint16))
    assert centre_crop(grey, 64)[32, 32].tolist() == [128, 128, 128]


def test_cropping_first_shows_the_same_pixels() -> None:
    columns = (np.sin(np.arange(900) / 9) * 100 + 128).astype(np.uint8)
    image = Image.fromarray(np.tile(columns, (30, 1)))
    for resolution in (12, 30, 64):  # ratio 30: cropped first; 20: as it is, and the centre is the same
        middle = image.crop((150, 0, 750, 30))
        first, whole = (centre_crop(x, resolution).astype(int) for x in (image, middle))
        assert np.abs(first - whole).max() <= 8


def test_an_ordinary_crop_is_as_adm_makes_it() -> None:
    noise = np.random.Generator(np.random.Philox(1)).integers(0, 256, (90, 61, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((30, 45), Image.Resampling.BOX)
    image = image.resize((24, 36), Image.Resampling.BICUBIC).crop((0, 6, 24, 30))
    assert np.array_equal(centre_crop(Image.fromarray(noise), 24), np.asarray(image))


def test_photographs_of_other_contents_are_skipped_and_told(tmp_path: Path) -> None:
    root = write_photographs(tmp_path, ("a",))
    (root / "a" / "1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    photographs = Photographs(list_photographs(root), 16)
    photographs.read_batch(range(4))
    assert list(photographs.corrupt.values()) == ["its contents are of none of these formats"]
