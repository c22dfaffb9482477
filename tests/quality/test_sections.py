import re

import pytest
from quality.record_example import block_of, example, layer, without_text

from auto_round.quality import sections


def text_of(html):
    return re.sub(r"<[^>]+>", " ", html).replace("\N{NO-BREAK SPACE}", " ")


def test_types_of_weights_are_told_with_their_sizes():
    words = text_of(sections.allocation(example()))
    assert "int4 g32 sym: 9.22 kB, 21 %" in words
    assert "16-bit: 16.4 kB, 38 %" in words
    assert "43.0 kB, 52.5 %" in words


def test_bits_are_mapped_only_where_they_differ():
    assert "Bits by layer" in sections.allocation(example())
    record = example()
    record["layers"] = [one for one in record["layers"] if "down_proj" not in one["name"]]
    assert "Bits by layer" not in sections.allocation(record)


def test_more_types_than_colours_share_the_last():
    record = example()
    kinds = [
        {"type": f"int{bits} g{size}", "layers": 1, "weights": 8, "bytes": 4} for bits in (2, 3) for size in range(6)
    ]
    record["size"]["types"] = kinds
    styles = re.findall(r'<i class="(\w+)"', sections.allocation(record))
    assert styles[:7] == [f"t{number}" for number in range(7)]
    assert set(styles[7:]) == {"t6"}


@pytest.mark.parametrize("section", [sections.block_errors, sections.tuning])
def test_what_was_not_measured_has_no_section(section):
    assert section(without_text()) == ""
    assert section(example()) != ""


def test_curves_of_a_run_that_was_resumed_from_another_version_may_be_missing():
    record = example()
    for block in record["blocks"]:
        block |= {"loss_curve": [], "steps": 0, "steps_per_point": None, "kept_step": None}
    told = sections.tuning(record)
    assert "Loss over the steps" not in told
    assert "<svg" in told


def test_errors_without_inputs_say_that_they_are_not_weighted():
    assert "weighted by the squares" in sections.layer_errors(example())
    assert "not weighted" in sections.layer_errors(without_text())


def test_the_table_of_blocks_has_their_figures_and_notes():
    record = example(blocks=[block_of(0, 0.02, 0.01, 0.0011, 0.0012, note="rounded to nearest instead")])
    words = text_of(sections.block_table(record))
    for told in (
        "0.0200",
        "0.0100",
        "\N{MINUS SIGN}50.0 %",
        "0.00110",
        "0.00120",
        "4 of 4",
        "rounded to nearest instead",
    ):
        assert told in words, told


def test_experts_of_a_list_are_one_row_with_their_mean_error():
    block = "model.layers.0"
    experts = [
        layer(f"{block}.mlp.experts.{number}.up_proj", block, "int4 g32 sym", 4.5, 0.01 * number, None)
        for number in range(1, 4)
    ]
    other = layer(f"{block}.mlp.experts.9.up_proj", block, "int8 g32 sym", 8.5, 1e-5, None, why="by 'experts.9'")
    record = example(layers=[*experts, other])
    words = text_of(sections.layer_table(record))
    assert "All layers (2)" in words
    assert f"{block}.mlp.experts.*.up_proj" in words
    assert "3 of 128 \N{MULTIPLICATION SIGN} 64" in words
    assert "0.0200" in words
    assert f"{block}.mlp.experts.9.up_proj" in words
