"""References and sample sources: what is read of them, and what may be compared with what."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from metric_data import SIDE, pictures, write_mean_colour
from PIL import Image

from flowturbo.evaluation.quality import image_files, populations
from flowturbo.evaluation.quality.features import INCEPTION, Extractor, ExtractorInfo, open_extractor
from flowturbo.evaluation.quality.image_files import FolderImages, NpzImages
from flowturbo.evaluation.quality.metrics import compute_metrics
from flowturbo.evaluation.quality.populations import (
    ImageSet,
    Origin,
    check_same_extractor,
    load_pack,
    measure_image_set,
    save_pack,
)
from flowturbo.evaluation.quality.references import load_reference
from runtime.backends.base import BackendOptions
from runtime.system.errors import DataError, RequestError


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    path = write_mean_colour(tmp_path_factory.mktemp("extractor") / "mean.onnx")
    return open_extractor(str(path), input_size=SIDE)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez_compressed(tmp_path / "images.npz", arr_0=pictures(150), arr_1=np.zeros(150, np.int64))
    return tmp_path / "images.npz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, image in enumerate(pictures(70)):
        path = tmp_path / "images" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    Image.fromarray(pictures(1)[0]).save(tmp_path / "images" / "grid.png")
    return tmp_path / "images"


def test_an_npz_is_streamed_forwards_and_back(npz: Path) -> None:
    source, images = NpzImages(npz), pictures(150)
    assert (source.count, source.chunk_size) == (150, 64)
    for start in (0, 64, 128, 64, 0, 128):
        np.testing.assert_array_equal(source.read(start), images[start : start + 64])


def test_a_folder_gives_every_image_once_and_no_grid(folder: Path) -> None:
    source = FolderImages(folder)
    found = np.concatenate([source.read(0), source.read(64)])
    assert source.count == len(found) == 70
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in pictures(70))
    labels = [path.parent.name for path in source.files]
    assert labels != sorted(labels)  # every part holds all classes
    assert FolderImages(folder).key == source.key
    assert FolderImages(folder, 8).key != source.key
    assert FolderImages(folder, 8).read(0).shape == (64, 8, 8, 3)


def test_images_that_cannot_be_used_say_why(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (SIDE, 2 * SIDE)).save(folder / "tall.png")
    with pytest.raises(DataError, match="--resolution N"):
        source = FolderImages(folder)
        _ = source.read(0), source.read(64)
    (folder / "torn.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"torn\.png cannot be read"):
        source = FolderImages(folder, SIDE)
        _ = source.read(0), source.read(64)
    with pytest.raises(DataError, match="no images"):
        FolderImages(
            tmp_path / "images" / "none" if (tmp_path / "images" / "none").mkdir() else tmp_path / "images/none"
        )
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(DataError, match="uint8"):
        NpzImages(tmp_path / "floats.npz")
    np.savez(tmp_path / "empty.npz", arr_0=np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="N ≥ 1"):
        NpzImages(tmp_path / "empty.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="holds x, and no arr_0"):
        NpzImages(tmp_path / "other.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match=r"\.npz"):
        NpzImages(tmp_path / "cut.npz")


def test_features_are_kept_and_a_damaged_chunk_is_made_again(npz: Path, extractor: Extractor, tmp_path: Path) -> None:
    first = measure_image_set(NpzImages(npz), extractor, tmp_path / "cache", "images")
    chunks = sorted((tmp_path / "cache").rglob("*.npz"))
    assert [chunk.name for chunk in chunks] == ["0000000.npz", "0000064.npz", "0000128.npz"]
    stamps = [chunk.stat().st_mtime_ns for chunk in chunks]
    chunks[1].write_bytes(b"half")
    again = measure_image_set(NpzImages(npz), extractor, tmp_path / "cache", "images")
    np.testing.assert_array_equal(again.population.features, first.population.features)
    assert [chunk.stat().st_mtime_ns == stamp for chunk, stamp in zip(chunks, stamps, strict=True)] == [
        True,
        False,
        True,
    ]


def test_a_pack_keeps_what_metrics_need(npz: Path, folder: Path, extractor: Extractor, tmp_path: Path) -> None:
    found, samples = (measure_image_set(s, extractor, None, s.key) for s in (NpzImages(npz), FolderImages(folder)))
    save_pack(tmp_path / "pack.npz", found)
    kept = load_reference(tmp_path / "pack.npz", extractor)
    assert kept.origin == found.origin
    expected = compute_metrics(samples.population, found.population)
    values = compute_metrics(samples.population, kept.population)
    assert values["fid"] == pytest.approx(expected["fid"], rel=1e-9)
    assert values["kid"] == pytest.approx(expected["kid"], abs=1e-3)  # fp16 features
    with pytest.raises(DataError, match="no reference pack"):
        load_pack(npz)


def test_features_of_two_extractors_never_meet(npz: Path, extractor: Extractor, tmp_path: Path) -> None:
    other = open_extractor(str(write_mean_colour(tmp_path / "other.onnx")), input_size=SIDE, input_range="-1..1")
    one, two = (measure_image_set(NpzImages(npz), e, None, "images") for e in (extractor, other))
    with pytest.raises(RequestError, match="one extractor"):
        check_same_extractor([one, two])
    check_same_extractor([one, one])
    with pytest.warns(UserWarning, match="does not say"):
        check_same_extractor([one, ImageSet(one.population, Origin("features.npy", 3))])


def test_adm_statistics_are_of_the_inception(tmp_path: Path, extractor: Extractor) -> None:
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=pictures(70))
    with pytest.raises(DataError, match="--features inception"):
        load_reference(tmp_path / "adm.npz", extractor)


def test_adm_statistics_are_taken_as_they_are(tmp_path: Path) -> None:
    """An extractor of the Inception's name; features of the images only where a metric asks for them."""
    mu, sigma = np.arange(3.0), np.diag([1.0, 2.0, 3.0])
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu + 1, sigma_s=2 * sigma, arr_0=pictures(70))
    path = write_mean_colour(tmp_path / "inception.onnx", side=SIDE)
    extractor = Extractor(path, ExtractorInfo(INCEPTION), None, BackendOptions(provider="cpu"))
    found = load_reference(tmp_path / "adm.npz", extractor, ["fid", "sfid"]).population
    assert found.features is None and found.count == 70
    for moments, mean, covariance in ((found.moments, mu, sigma), (found.spatial, mu + 1, 2 * sigma)):
        assert moments is not None
        np.testing.assert_array_equal(moments.mean, mean)
        np.testing.assert_array_equal(moments.covariance, covariance)
    whole = load_reference(tmp_path / "adm.npz", extractor).population
    assert whole.features is not None and whole.features.shape == (70, 3)


def test_pictures_of_an_npy_are_those_of_an_npz(tmp_path: Path, extractor: Extractor) -> None:
    images = pictures(70)
    np.save(tmp_path / "images.npy", images)
    source = NpzImages(tmp_path / "images.npy")
    assert source.count == 70
    for start in (64, 0):
        np.testing.assert_array_equal(source.read(start), images[start : start + 64])
    assert load_reference(tmp_path / "images.npy", extractor).population.count == 70


@pytest.mark.parametrize(
    ("change", "says", "remedy"),
    [
        (lambda x: np.asfortranarray(x), "Fortran order", "ascontiguousarray"),
        (lambda x: np.ascontiguousarray(x.transpose(0, 3, 1, 2)), r"uint8 \[3, 3,", "transpose"),
        (lambda x: (x / 255).astype(np.float32), "float32", "images * 255"),
        (lambda x: x[..., 0], r"uint8 \[3", "np.save"),
        (lambda x: x.astype(object), "cannot be read|Python objects", ""),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_of_another_kind_are_refused_by_the_files_name(
    tmp_path: Path, suffix: str, change, says: str, remedy: str
) -> None:  # type: ignore[no-untyped-def]
    path, images = tmp_path / f"mine.{suffix}", change(pictures(3))
    if suffix == "npz":
        np.savez(path, arr_0=images)
    else:
        np.save(path, images, allow_pickle=True)
    with pytest.raises(DataError, match=says) as caught:
        NpzImages(path)
    assert "mine." in caught.value.given and caught.value.allowed
    assert remedy in caught.value.remedy


def write_npy_header(shape: str) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    "shape", ["(10**12, 8, 8, 3)", "(1000000000000, 8, 8, 3)", "(-1, 8, 8, 3)", "x", "(9, 8, 8, 3)"]
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_header_that_promises_too_much_is_refused(tmp_path: Path, suffix: str, shape: str) -> None:
    path, contents = tmp_path / f"mine.{suffix}", write_npy_header(shape) + bytes(100)
    if suffix == "npy":
        path.write_bytes(contents)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", contents)
    with pytest.raises(DataError, match="mine"):
        NpzImages(path)


def test_hidden_files_are_no_samples(folder: Path) -> None:
    for name in ("._0.png", "__MACOSX/._1.png", "class0/.DS_Store.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\26\7")
    assert FolderImages(folder).count == 70


def test_features_of_jpegs_outlive_a_change_of_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have neither alpha nor 16 bits, so features from before are right."""
    for suffix in ("jpg", "png"):
        (tmp_path / suffix).mkdir()
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / suffix / f"a.{suffix}")
    sources = [FolderImages(tmp_path / suffix) for suffix in ("jpg", "png")]
    before = [source.key for source in sources]
    monkeypatch.setattr(image_files, "READER_VERSION", 99)
    assert [source.key == key for source, key in zip(sources, before, strict=True)] == [True, False]


def test_samples_with_alpha_and_16_bits_are_read_as_training_reads_them(tmp_path: Path) -> None:
    Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 0)).save(tmp_path / "alpha.png")
    Image.fromarray(np.full((SIDE, SIDE), 0x8000, np.uint16)).save(tmp_path / "grey.png")
    for resolution in (None, SIDE):
        assert {int(x.max()) for x in FolderImages(tmp_path, resolution).read(0)} == {255, 0x80}


def test_a_sample_that_is_postscript_is_refused(folder: Path) -> None:
    (folder / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    source = FolderImages(folder, SIDE)
    with pytest.raises(DataError, match=r"x\.png cannot be read"):
        _ = source.read(0), source.read(64)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("about", lambda a: np.asarray("[" * 5000)),
        ("about", lambda a: np.asarray(str(a).replace('"count": 70', '"count": -1'))),
        ("about", lambda a: np.asarray(str(a).replace('"count": 70', '"count": 0'))),
        ("about", lambda a: np.asarray(str(a).replace('"count": 70', '"count": 1' + "0" * 30))),
        ("about", lambda a: np.asarray(str(a).replace('"count": 70', '"count": Infinity'))),
        ("mean", lambda a: a * np.nan),
        ("mean", lambda a: np.zeros(10**6)),
        ("mean", lambda a: a.astype(str)),
        ("covariance", lambda a: -a),
        ("covariance", lambda a: a * np.inf),
        ("features", lambda a: a[:, 0]),
        ("features", lambda a: a * np.nan),
        ("features", lambda a: a[:, :-1]),
        ("features", lambda a: np.concatenate([a, a])),
    ],
)
def test_packs_with_impossible_numbers_are_refused(
    folder: Path, extractor: Extractor, tmp_path: Path, name: str, change
) -> None:  # type: ignore[no-untyped-def]
    pack = tmp_path / "pack.npz"
    save_pack(pack, measure_image_set(FolderImages(folder), extractor, None, "images"))
    with np.load(pack) as archive:
        arrays = dict(archive)
    np.savez(pack, **{**arrays, name: change(arrays[name])})
    with pytest.raises(DataError, match=r"pack\.npz") as caught:
        load_pack(pack)
    assert caught.value.remedy


def test_a_pack_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "pack.npz", features=np.zeros((1000, 1000), np.float16))
    monkeypatch.setattr(populations, "MAX_PACK_BYTES", 1 << 20)
    with pytest.raises(DataError, match="unpacks to 2,000,128 bytes") as caught:
        load_pack(tmp_path / "pack.npz")
    assert "1,048,576" in caught.value.allowed


LARGE_IMAGES, PIXELS = 1000, 256
MEASURE = r"""
import re, sys
from pathlib import Path
from flowturbo.evaluation.quality.features import INCEPTION, ExtractorInfo, Extractor
from flowturbo.evaluation.quality.metrics import Moments, Population, compute_metrics
from flowturbo.evaluation.quality.references import load_reference
from runtime.backends.base import BackendOptions
import numpy as np

def peak():
    # Largest resident memory so far in MiB; getrusage would give that of the process that started this one.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

extractor = Extractor(Path(sys.argv[2]), ExtractorInfo(INCEPTION), None, BackendOptions(provider="cpu"))
samples = Population(2, Moments.from_statistics(2, np.zeros(2048), np.zeros((2048, 2048))))
np.linalg.eigh(np.eye(8))
before = peak()
reference = load_reference(Path(sys.argv[1]), extractor, ["fid"])
loaded = peak()
fid = compute_metrics(samples, reference.population, ["fid"])["fid"]
after = peak()
print(fid, loaded - before, after - before)
"""


def test_fid_against_an_adm_file_reads_what_it_needs(tmp_path: Path) -> None:
    """The layout of ADM's 2 GB file with the full statistics and 200 MB of images: growth stays below 150 MB."""
    diagonal = np.linspace(0.5, 1.5, 2048)
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.zeros((LARGE_IMAGES, PIXELS, PIXELS, 3), np.uint8),
        mu=np.full(2048, 0.5),
        sigma=np.diag(diagonal),
        mu_s=np.zeros(2023),
        sigma_s=np.eye(2023),
    )
    path = write_mean_colour(tmp_path / "inception.onnx", side=SIDE)
    root = Path(__file__).parents[4]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "adm.npz"), str(path)],
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    fid, loading, growth = map(float, run.stdout.split())
    assert fid == pytest.approx(2048 * 0.25 + diagonal.sum(), rel=1e-6)  # against a point at 0
    assert loading < growth < 150
