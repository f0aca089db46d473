"""`python -m gralora`: the command line, as `torchrun … -m gralora` and `accelerate launch -m gralora` start it."""

from gralora.cli import main

if __name__ == "__main__":
    main()
