"""The line about an update."""

from opd_jax.report.progress import progress_line


def test_the_progress_line_says_what_was_measured_and_how_long_is_left() -> None:
    line = progress_line(
        step=12,
        total_steps=200,
        loss=0.43214,
        success=0.25,
        verdicts={"skip": 0.5, "weak": 0.25},
        tokens_per_s=1234.0,
        seconds_per_step=1.0,
    )
    assert line == " 12/200  loss 0.4321  success 25%  skip 50% weak 25%  1.23k tok/s  03:08 left"
    nothing = dict.fromkeys(("success", "verdicts", "tokens_per_s"))
    line = progress_line(step=1, total_steps=11, loss=1.0, seconds_per_step=725.0, **nothing)
    assert line == " 1/11  loss 1.0000  2:00:50 left"
