"""annotate: tensors untouched, strip gives back the bytes, failures leave nothing behind."""

import hashlib
import os
import subprocess
import sys
import tracemalloc

import gguf
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fakes.gguf_bytes import TENSORS, array, base_keys, kv, model, shard, swaa_keys
from support.fakes.gguf_bytes import gguf as file_of
from swaa_edge import SwaaConfig
from swaa_edge.convert.annotate import annotate
from swaa_edge.errors import ConfigError, ModelFileError, OutputError, UnsupportedModelError
from swaa_edge.files.header import read_header
from swaa_edge.metadata import PADDING_KEY, read_swaa

CONFIG = SwaaConfig(2048, 64, "1::2", True, recipe="quality")


def files(folder):
    """Every file with its content: what a failure must not change."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def data_of(path):
    header = read_header(path)
    return path.read_bytes()[header.data_start :]


LAYOUTS = {
    "version 3": model(),
    "version 2": model(version=2),
    "alignment 64": model(alignment=64),
    "alignment 256": model(alignment=256),
    "alignment 1": model(alignment=1),
    "padding of ones": model(fill=b"\1"),
    "padding of ones, alignment 64": model(fill=b"\xff", alignment=64),
    "bytes after the data": model(tail=b"trailing bytes"),
    "keys of other types": model(extra=[array("x.a", "str", ["", "b"]), kv("x.f", "f32", 1.5), kv("x.e", "str", "")]),
    "no tensors": model(tensors=[]),
    "no tensors, no padding": model(tensors=[], pad=False),
    "no tensors, bytes after": model(tensors=[], tail=b"more"),
    "no tensors, no padding, bytes after": model(tensors=[], pad=False, tail=b"m"),
    "an odd number of bytes": model(extra=[kv("x.e", "str", "odd")]),
}


@pytest.mark.parametrize("content", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strip_gives_back_the_original_bytes(write, tmp_path, content):
    source = write(content)
    annotate(source, tmp_path / "with.gguf", CONFIG)
    assert read_swaa(tmp_path / "with.gguf") == SwaaConfig(2048, 64, (1, 3), True)
    assert read_header(tmp_path / "with.gguf").tensors == read_header(source).tensors
    assert data_of(tmp_path / "with.gguf") == data_of(source)
    # Another recipe over the first, with keys of other lengths, changes nothing about that.
    other = SwaaConfig(1, 0, "all", recipe="a longer name", adapter="lora")
    annotate(tmp_path / "with.gguf", tmp_path / "again.gguf", other)
    assert read_swaa(tmp_path / "again.gguf").adapter == "lora"
    for annotated in ("with.gguf", "again.gguf"):
        annotate(tmp_path / annotated, tmp_path / "back.gguf", force=True)
        assert (tmp_path / "back.gguf").read_bytes() == content
    assert source.read_bytes() == content


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.sampled_from([1, 32, 128]), st.text("ab", min_size=1, max_size=40), st.booleans())
def test_strip_for_any_alignment_of_the_parts(tmp_path_factory, extra, alignment, recipe, ones):
    folder = tmp_path_factory.mktemp("any")
    content = model(extra=[kv("x", "str", "y" * extra)], alignment=alignment, fill=b"\1" if ones else b"\0")
    (folder / "model.gguf").write_bytes(content)
    annotate(folder / "model.gguf", folder / "with.gguf", SwaaConfig(8, recipe=recipe))
    assert (folder / "with.gguf").read_bytes() != content
    assert data_of(folder / "with.gguf") == data_of(folder / "model.gguf")
    annotate(folder / "with.gguf", in_place=True)
    assert (folder / "with.gguf").read_bytes() == content


def test_only_odd_padding_costs_a_key_of_its_own(write, tmp_path):
    for name, content, stored in (("zeros", model(), False), ("ones", model(fill=b"\1"), True)):
        annotate(write(content), tmp_path / name, CONFIG)
        assert (PADDING_KEY in read_header(tmp_path / name).fields) is stored


def test_strip_takes_out_what_another_program_put_anywhere(write, tmp_path):
    first, *rest = base_keys()
    mine = swaa_keys(later=kv("swaa.later", "u32", 5))
    source = write(file_of([*mine[:2], first, *mine[2:5], *rest, *mine[5:]], TENSORS))
    annotate(source, tmp_path / "plain.gguf")
    assert (tmp_path / "plain.gguf").read_bytes() == model()
    annotate(source, tmp_path / "new.gguf", CONFIG)
    annotate(write(model(), "other.gguf"), tmp_path / "expected.gguf", CONFIG)
    assert (tmp_path / "new.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


def test_wrong_keys_can_be_replaced_and_stripped(write, tmp_path):
    source = write(model(extra=swaa_keys(version=kv("swaa.version", "str", "x"), sliding_layers=None)))
    annotate(source, tmp_path / "new.gguf", CONFIG)
    assert read_swaa(tmp_path / "new.gguf") == SwaaConfig(2048, 64, (1, 3), True)
    annotate(source, tmp_path / "plain.gguf")
    assert (tmp_path / "plain.gguf").read_bytes() == model()


def test_a_fine_tune_stays_named_when_settings_change(write, tmp_path):
    source = write(model(extra=swaa_keys(adapter=kv("swaa.adapter", "str", "lora-1"))))
    annotate(source, tmp_path / "kept.gguf", CONFIG)
    assert read_swaa(tmp_path / "kept.gguf").adapter == "lora-1"
    annotate(source, tmp_path / "named.gguf", SwaaConfig(8, adapter="lora-2"))
    assert read_swaa(tmp_path / "named.gguf").adapter == "lora-2"


def test_other_programs_read_the_file(tmp_path):
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    writer = gguf.GGUFWriter(source, "qwen3")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b"])
    weights = numpy.random.default_rng(1).normal(size=(5, 64)).astype(numpy.float16)
    writer.add_tensor("output.weight", weights)
    writer.add_tensor("norm.weight", numpy.ones(7, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    annotate(source, target, SwaaConfig(16, 2, [1], [2], adapter="lora"))
    found = gguf.GGUFReader(target)
    values = {key: field.contents() for key, field in found.fields.items() if key.startswith("swaa.")}
    assert values == {
        "swaa.version": 1,
        "swaa.window_size": 16,
        "swaa.sink_count": 2,
        "swaa.sliding_layers": [True, False, True],
        "swaa.fa_decode_layers": [False, False, True],
        "swaa.recipe": "custom",
        "swaa.adapter": "lora",
    }
    assert found.fields["qwen3.block_count"].contents() == 3
    assert numpy.array_equal(found.tensors[0].data, weights) and found.tensors[1].data.sum() == 7


def test_in_place(write, tmp_path):
    source = write(model())
    source.chmod(0o640)
    assert annotate(source, config=CONFIG, in_place=True) == [source]
    assert read_swaa(source).window_size == 2048
    assert source.stat().st_mode & 0o777 == 0o640
    annotate(source, in_place=True)
    assert source.read_bytes() == model()
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_in_place_leaves_alone_what_a_link_points_to(write, tmp_path):
    source = write(model(), "blob")
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    annotate(link, config=CONFIG, in_place=True)
    assert read_swaa(link) is not None and not link.is_symlink()
    assert source.read_bytes() == model()


def test_force_replaces_also_the_source_itself(write, tmp_path):
    source = write(model())
    before = files(tmp_path)
    for output in (source, write(b"precious", "other.gguf")):
        before = files(tmp_path)
        with pytest.raises(OutputError, match=r"exists already; pass --force"):
            annotate(source, output, CONFIG)
        assert files(tmp_path) == before
        annotate(source, output, CONFIG, force=True)
        assert read_swaa(output) is not None


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("in_place", [True, False])
def test_an_interrupted_write_leaves_nothing(write, tmp_path, stop, in_place):
    write(model(), "out.gguf")
    source = write(model(extra=swaa_keys()))
    before = files(tmp_path)

    def interrupt(done, total):
        if done > total / 2:
            raise stop

    with pytest.raises(stop):
        output = None if in_place else tmp_path / "out.gguf"
        annotate(source, output, in_place=in_place, force=True, on_progress=interrupt)
    assert files(tmp_path) == before


def test_progress_ends_at_the_whole(write, tmp_path):
    seen = []
    annotate(write(model()), tmp_path / "out.gguf", CONFIG, on_progress=lambda *at: seen.append(at))
    size = (tmp_path / "out.gguf").stat().st_size
    assert seen[-1] == (size, size) and seen == sorted(seen) and {total for _, total in seen} == {size}


def test_a_source_that_shrinks_meanwhile(write, tmp_path):
    source = write(model())
    before = set(files(tmp_path))

    def shrink(done, total):
        os.truncate(source, 100)

    with pytest.raises(ModelFileError, match="while it was read"):
        annotate(source, tmp_path / "out.gguf", CONFIG, on_progress=shrink)
    assert set(files(tmp_path)) == before


def test_a_source_that_changes_meanwhile(write, tmp_path):
    source = write(model())

    def rename_a_tensor(done, total):
        source.write_bytes(model().replace(b"output.weight", b"output.height"))

    with pytest.raises(ModelFileError, match="changed while it was read"):
        annotate(source, tmp_path / "out.gguf", CONFIG, on_progress=rename_a_tensor)
    assert set(files(tmp_path)) == {"model.gguf"}


@pytest.mark.parametrize(
    "content, config, error, part",
    [
        (b"not a model", CONFIG, ModelFileError, "not a GGUF"),
        (b"", None, ModelFileError, "empty"),
        (model()[:-40], CONFIG, ModelFileError, "truncated"),
        (model()[:-40], None, ModelFileError, "truncated"),
        (file_of([kv("general.name", "str", "x")]), CONFIG, ModelFileError, "general.architecture"),
        (file_of(base_keys()[:2]), CONFIG, ModelFileError, "llama.block_count is missing"),
        (model(), SwaaConfig(8, fa_layers=[4]), ConfigError, "fa_layers has layer 4, but the model has 4 layers"),
        (model(), SwaaConfig(8, fa_decode=[7]), ConfigError, "fa_decode has layer 7"),
        (model(arch="gemma2"), CONFIG, UnsupportedModelError, "gemma2"),
        (model(extra=[kv("swaa.padding", "str", "zz")]), None, ModelFileError, "hexadecimal"),
        (model(extra=[kv("swaa.padding", "u32", 5)]), None, ModelFileError, "hexadecimal"),
        (model(extra=[kv("swaa.padding", "str", "00" * 99)]), None, ModelFileError, "swaa.padding has 99 bytes"),
    ],
)
def test_what_cannot_be_done_leaves_no_output(write, tmp_path, content, config, error, part):
    source = write(content)
    with pytest.raises(error, match=part):
        annotate(source, tmp_path / "out.gguf", config)
    with pytest.raises(error, match=part):
        annotate(source, config=config, in_place=True)
    assert files(tmp_path) == {"model.gguf": content}


def test_every_truncated_header_is_refused_without_output(write, tmp_path):
    good = model(extra=swaa_keys())
    source = write(good)
    for length in range(0, read_header(source).data_start, 7):
        source.write_bytes(good[:length])
        with pytest.raises(ModelFileError):
            annotate(source, tmp_path / "out.gguf", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_outputs_that_cannot_be_written(write, tmp_path):
    source = write(model())
    with pytest.raises(OutputError, match="does not exist"):
        annotate(source, tmp_path / "nowhere" / "out.gguf", CONFIG)
    with pytest.raises(OutputError, match="is a folder"):
        annotate(source, tmp_path, CONFIG)
    for both in ({"output": tmp_path / "x", "in_place": True}, {}):
        with pytest.raises(OutputError, match="either an output"):
            annotate(source, config=CONFIG, **both)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a thing of POSIX")
def test_a_full_disk_is_one_line_and_leaves_nothing(write, tmp_path):
    source = write(model(tail=bytes(range(256)) * 1000))
    before = files(tmp_path)
    # A limit on file sizes fails the write in the middle, as a full disk does.
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from swaa_edge.cli import main; sys.argv[0] = 'swaa-edge'; main()"
    )
    for where in (["-o", str(tmp_path / "out.gguf")], ["--in-place"]):
        command = [sys.executable, "-c", code, "annotate", str(source), *where, "--recipe", "fast"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr.startswith("Error: cannot write ") and run.stderr.count("\n") == 1, run.stderr
        assert files(tmp_path) == before


def test_a_file_of_many_gigabytes_in_little_memory(tmp_path):
    source, target, back = (tmp_path / name for name in ("big.gguf", "with.gguf", "back.gguf"))
    head = model(tensors=[])
    size = len(head) + (4 << 30) + 12345  # beyond what 32 bits can count
    marks = {len(head): b"first", (2 << 30) + 1: b"middle", size - 4: b"last"}
    with open(source, "wb") as file:
        file.write(head)
        for at, mark in marks.items():
            file.seek(at)
            file.write(mark)
    if source.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("this file system has no sparse files")
    tracemalloc.start()
    annotate(source, target, CONFIG)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20, f"{peak} bytes"
    shift = target.stat().st_size - source.stat().st_size
    assert 0 < shift < 1024
    with open(target, "rb") as file:
        for at, mark in marks.items():
            file.seek(at + shift)
            assert file.read(len(mark)) == mark
    assert target.stat().st_blocks * 512 < 1 << 30
    annotate(target, back)
    assert back.stat().st_size == source.stat().st_size
    with open(back, "rb") as file:
        for at, mark in marks.items():
            file.seek(at)
            assert file.read(len(mark)) == mark


@pytest.fixture
def split_model(write):
    return [write(shard(number), f"m-{number + 1:05d}-of-00003.gguf") for number in range(3)]


def test_a_split_model_is_written_whole(split_model, tmp_path):
    target = tmp_path / "new"
    target.mkdir()
    written = annotate(split_model[0], target / "n-00001-of-00003.gguf", CONFIG)
    assert [path.name for path in written] == [f"n-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert sorted(files(target)) == [path.name for path in written]
    assert read_swaa(written[0]).window_size == 2048
    assert [path.read_bytes() for path in written[1:]] == [shard(1), shard(2)]
    annotate(written[0], tmp_path / "back-00001-of-00003.gguf")
    assert (tmp_path / "back-00001-of-00003.gguf").read_bytes() == shard(0)


def test_a_split_model_in_place_changes_the_first_file_only(split_model):
    before = [os.stat(path).st_mtime_ns for path in split_model[1:]]
    assert annotate(split_model[0], config=CONFIG, in_place=True) == [split_model[0]]
    assert read_swaa(split_model[0]).window_size == 2048
    assert [os.stat(path).st_mtime_ns for path in split_model[1:]] == before
    annotate(split_model[0], in_place=True)
    assert split_model[0].read_bytes() == shard(0)


@pytest.mark.parametrize("in_place", [True, False])
def test_what_is_wrong_with_a_split_model_is_named(split_model, write, tmp_path, in_place):
    def fails(source, error, part, output="new-00001-of-00003.gguf"):
        before = files(tmp_path)
        with pytest.raises(error, match=part):
            annotate(source, None if in_place else tmp_path / output, CONFIG, in_place=in_place)
        assert files(tmp_path) == before

    fails(split_model[1], ModelFileError, r"is file 2 of a split model.*give .*m-00001-of-00003\.gguf")
    fails(write(shard(0), "renamed.gguf"), ModelFileError, r"rename it to NAME-00001-of-00003\.gguf")
    if not in_place:
        fails(split_model[0], OutputError, r"split into 3 files.*NAME-00001-of-00003\.gguf", "new.gguf")
        fails(split_model[0], OutputError, r"NAME-00001-of-00003\.gguf", "new-00001-of-00004.gguf")
        write(b"precious", "new-00002-of-00003.gguf")
        fails(split_model[0], OutputError, r"new-00002-of-00003\.gguf exists already")
    write(shard(2), "m-00002-of-00003.gguf")
    fails(split_model[0], ModelFileError, r"m-00002-of-00003\.gguf is not file 2 of 3")
    write(shard(1)[:-40], "m-00002-of-00003.gguf")
    fails(split_model[0], ModelFileError, r"m-00002-of-00003\.gguf is truncated")
    split_model[2].unlink()
    fails(split_model[0], ModelFileError, r"m-00003-of-00003\.gguf is missing")


def test_a_real_digest(write, tmp_path):
    """The bytes of an annotated file, pinned: a change of the written form must be a decision."""
    annotate(write(model()), tmp_path / "out.gguf", SwaaConfig(2048, 100, "1::2", True, recipe="quality"))
    digest = hashlib.sha256((tmp_path / "out.gguf").read_bytes()).hexdigest()
    assert digest == "53379a83218c8c12d2e21c58f8ca6c4a9250f59df8cf5938334347434ce2851e"
