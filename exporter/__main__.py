"""`python -m austeer.exporter`, the form that torchrun and accelerate launch start: `-m`."""

from austeer.exporter.cli import main

if __name__ == "__main__":
    main()
