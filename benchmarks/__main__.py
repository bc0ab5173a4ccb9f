"""C{python -m benchmarks} is C{python -m benchmarks.bench}."""

from benchmarks.bench import main

if __name__ == "__main__":
    raise SystemExit(main())
