"""`python -m qlora_kit`: the same program as `qlora-kit`."""

from qlora_kit.cli import main

if __name__ == "__main__":
    main()
