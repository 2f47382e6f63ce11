"""Laws of reporting.py: what is printed is aligned, what is written reads back, what is replaced is only the block."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import reporting
from reporting import Column, format_bytes, format_count, format_percent, format_ratio, format_seconds, format_value

ROWS = [
    {"name": "dense", "seconds": 0.25, "hits": 3, "exact": True},
    {"name": "per image", "seconds": 0.0125, "hits": None, "exact": True},
    {"name": "all | of it", "note": "out of memory"},
]
README = """# Title

<!-- results:speed -->
old \\1
<!-- /results:speed -->
middle
<!-- results:memory -->
<!-- /results:memory -->
end
"""


@pytest.mark.parametrize(
    "text, expected",
    [
        (format_seconds(0), "0.00 ns"),
        (format_seconds(0.00123), "1.23 ms"),
        (format_seconds(0.000999_96), "1.00 ms"),  # rounding that reaches the next unit takes it
        (format_seconds(45.6e-6), "45.6 µs"),
        (format_seconds(90), "90.0 s"),
        (format_seconds(480), "8.0 min"),
        (format_bytes(512), "512 B"),
        (format_bytes(1536), "1.50 KiB"),
        (format_bytes(-1536), "-1.50 KiB"),
        (format_bytes(2**20 - 1), "1.00 MiB"),
        (format_bytes(5000 * 2**40), "5000 TiB"),
        (format_count(1234), "1234"),
        (format_count(12_345), "12.3 k"),
        (format_count(86_000_000), "86.0 M"),
        (format_count(1.2e9, "FLOP/s"), "1.20 GFLOP/s"),
        (format_percent(0.9512), "95.1 %"),
        (format_ratio(1.5), "1.50×"),
        (format_ratio(2), "2.00×"),
        (format_ratio(0.049), "0.05×"),
        (format_value(1.23456e-6), "1.235e-06"),
        (format_value(False), "no"),
        (format_value(1024), "1024"),
    ],
)
def test_numbers_carry_three_digits_and_the_unit_that_suits_them(text, expected):
    assert text == expected


def test_table_aligns_text_left_and_numbers_right():
    columns = ["name", Column("seconds", "time", format_seconds), "hits", "note"]
    assert reporting.table(ROWS, columns, title="Attention").splitlines() == [
        "Attention",
        "",
        "name            time  hits  note",
        "-----------  -------  ----  -------------",
        "dense         250 ms     3  -",
        "per image    12.5 ms     -  -",
        "all | of it        -     -  out of memory",
    ]


def test_table_shows_every_key_by_default():
    heading = reporting.table(ROWS).splitlines()[0]
    assert heading.split() == ["name", "seconds", "hits", "exact", "note"]


def test_markdown_table_holds_the_same_cells():
    columns = ["name", Column("seconds", "time", format_seconds), "note"]
    assert reporting.markdown_table(ROWS, columns).splitlines() == [
        "| name | time | note |",
        "| --- | ---: | --- |",
        "| dense | 250 ms | - |",
        "| per image | 12.5 ms | - |",
        "| all \\| of it | - | out of memory |",
    ]


@pytest.mark.parametrize("render", [reporting.table, reporting.markdown_table])
def test_a_table_of_nothing_or_of_a_misspelt_column_is_an_error(render):
    with pytest.raises(ValueError, match="rows is empty"):
        render([])
    with pytest.raises(ValueError, match="'second'"):
        render(ROWS, ["name", "second"])


def test_json_reads_back_equal_sorted_and_leaves_nothing_else(tmp_path):
    payload = {"b": [1, 2.5, None, True, "µ"], "a": {"z": 1e-300, "y": {}}}
    path = tmp_path / "new" / "folder" / "result.json"
    assert reporting.write_json(path, payload) == path
    assert reporting.read_json(path) == payload
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["a", "b"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "payload, place",
    [
        ({"rows": [{"p10": math.nan}]}, r"payload\['rows'\]\[0\]\['p10'\] is nan"),
        ([1.0, -math.inf], r"payload\[1\] is -inf"),
        ({"latents": {64: 0.98}}, r"payload\['latents'\] has the keys \[64\]"),
        ({"path": Path("x")}, r"payload\['path'\] is a \w*Path"),
    ],
)
def test_json_that_would_not_read_back_names_the_place_and_keeps_the_old_file(tmp_path, payload, place):
    path = reporting.write_json(tmp_path / "result.json", {"kept": 1})
    with pytest.raises(ValueError, match=place):
        reporting.write_json(path, payload)
    assert reporting.read_json(path) == {"kept": 1}


def test_an_interrupted_write_keeps_the_old_file_and_no_scrap(tmp_path, monkeypatch):
    path = reporting.write_json(tmp_path / "result.json", {"kept": 1})

    def interrupted(source, target):
        assert Path(source).parent == path.parent, "a rename is atomic only within one file system"
        raise KeyboardInterrupt

    monkeypatch.setattr(reporting.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reporting.write_json(path, {"kept": 2})
    assert reporting.read_json(path) == {"kept": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.json is damaged"):
        reporting.read_json(path)
    with pytest.raises(FileNotFoundError):
        reporting.read_json(tmp_path / "absent.json")


def test_replacing_a_block_changes_that_block_only():
    text = reporting.replace_block(README, "speed", "| a | \\1 |\n")
    before, _, rest = README.partition("\nold \\1\n")
    assert text == f"{before}\n\n| a | \\1 |\n\n{rest}"
    assert reporting.replace_block(text, "speed", "| a | \\1 |\n") == text


@pytest.mark.parametrize(
    "text, problem",
    [
        (README.replace("<!-- results:speed -->", ""), "stands 0 times"),
        (README.replace("<!-- /results:speed -->", ""), "stands 0 times"),
        (README + "<!-- results:speed -->", "stands 2 times"),
        ("<!-- /results:speed -->\n<!-- results:speed -->", "stands before"),
    ],
)
def test_missing_repeated_or_swapped_markers_are_errors(text, problem):
    with pytest.raises(ValueError, match=problem):
        reporting.replace_block(text, "speed", "new")


def test_a_body_with_a_marker_is_an_error():
    with pytest.raises(ValueError, match="body of block 'speed'"):
        reporting.replace_block(README, "speed", "<!-- /results:speed -->")


def test_an_updated_readme_is_not_stale(tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(README.encode())
    blocks = {"speed": "fast", "memory": "small"}
    assert reporting.stale_blocks(path, blocks) == ["speed", "memory"]
    assert reporting.update_readme(path, blocks) == ["speed", "memory"]
    assert reporting.stale_blocks(path, blocks) == reporting.update_readme(path, blocks) == []
    assert reporting.stale_blocks(path, blocks | {"memory": "large"}) == ["memory"]


def test_an_update_with_one_unknown_block_changes_nothing(tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(README.encode())
    with pytest.raises(ValueError, match="results:absent"):
        reporting.update_readme(path, {"speed": "fast", "absent": "?"})
    assert path.read_bytes() == README.encode()


def test_plots_leave_global_settings_alone_and_importing_loads_no_matplotlib(tmp_path):
    """In a fresh process, where nothing else has touched matplotlib."""
    script = f"""
import sys, reporting
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
import matplotlib
before = dict(matplotlib.rcParams.copy())  # a copy, for to read the backend of the original is to choose one
figure, axes = reporting.new_figure(2, 3)
assert axes.shape == (2, 3)
axes[0, 0].plot([1, 2, 3])
reporting.save_figure(figure, r"{tmp_path}/plots/line.png")
assert dict(matplotlib.rcParams.copy()) == before and "matplotlib.pyplot" not in sys.modules and not figure.axes
"""
    root = Path(reporting.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["line.png"]


def test_a_saved_figure_shows_what_was_drawn(tmp_path):
    from PIL import Image

    figure, axes = reporting.new_figure(size=(2, 2), grid=False)
    axes[0, 0].imshow([[[255, 0, 0]]])
    with Image.open(reporting.save_figure(figure, tmp_path / "red.png")) as image:
        width, height = image.size
        assert image.format == "PNG" and image.convert("RGB").getpixel((width // 2, height // 2)) == (255, 0, 0)
    with pytest.raises(ValueError, match=r"\.png"):
        reporting.save_figure(figure, tmp_path / "red.jpg")
