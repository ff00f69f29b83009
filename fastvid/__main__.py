"""`python -m fastvid` is `fastvid`, also under torchrun."""

from fastvid.cli import program

if __name__ == "__main__":
    program()
