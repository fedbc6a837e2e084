"""Hardware by name and from a file; rates against the tables they were read from."""

import pytest

from dsv3.plan.hardware import hardware_named, known_hardware

DEEPGEMM = {512: 590, 1536: 990, 2048: 1062, 7168: 1300, 16384: 1358}  # TFLOPS on an H800 by length of sums, README


def test_unknown_hardware_names_the_known_ones():
    with pytest.raises(ValueError, match=r"no hardware 'a100'.*h800, h100, h200, b200.*cpu"):
        hardware_named("a100")


@pytest.mark.parametrize(("length", "rate"), DEEPGEMM.items())
def test_fp8_products_run_at_deepgemms_published_rates(length, rate):
    assert 1 / hardware_named("h800").product_seconds(1e12, length, "fp8") == pytest.approx(rate, rel=0.04)


def test_a_file_changes_what_it_names_and_keeps_the_rest(tmp_path):
    path = tmp_path / "slow.toml"
    path.write_text('like = "h800"\nprice = 1.25\nbetween = 25e9\n[products]\nfp8 = 7e14\n')
    found, base = hardware_named(str(path)), hardware_named("h800")
    assert (found.name, found.price, found.between) == ("slow", 1.25, 25e9)
    assert found.products == {**base.products, "fp8": 7e14}
    assert found.memory == base.memory
    path.write_text('like = "h800"\nspeed = 3\n')
    with pytest.raises(ValueError, match="speed"):
        hardware_named(str(path))


def test_a_precision_that_the_hardware_lacks_is_refused():
    with pytest.raises(ValueError, match=r"h800 has no fp4 products.*fp8"):
        hardware_named("h800").product_seconds(1.0, 1.0, "fp4")


def test_every_hardware_says_where_its_numbers_are_from():
    assert all(hardware.sources and hardware.price > 0 for hardware in known_hardware().values())


WRONG = (
    'memory = "big"',
    "attention = 3",
    "attention = [1.0]",
    'products = {fp8 = "x"}',
    "products = 5",
    "products = {fp9 = 1.0}",
)


@pytest.mark.parametrize("line", WRONG)
def test_a_value_of_another_kind_is_refused_with_one_that_would_do(tmp_path, line):
    (tmp_path / "mine.toml").write_text(line)
    with pytest.raises(ValueError, match=f"{line.split()[0]} = .* is of another kind than h100's"):
        hardware_named(str(tmp_path / "mine.toml"))
