"""The console script, and `python -m mergekit_vl`: signals are handled before anything large is imported."""

from mergekit_vl.system import interrupts


def main() -> None:
    interrupts.end_at_once()
    from mergekit_vl.commands import app

    app.main()


if __name__ == "__main__":
    main()
