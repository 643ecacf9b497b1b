"""`python -m coatnet` is `coatnet`."""

from coatnet.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
