"""The command as ``python -m qstar_decoding.cli``."""

from .app import main

if __name__ == "__main__":
    main()
