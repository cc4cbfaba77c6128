"""`python -m multilora.cli`, for one more release: use `python -m multilora`."""

from multilora.app.cli import main as main

if __name__ == "__main__":
    raise SystemExit(main())
