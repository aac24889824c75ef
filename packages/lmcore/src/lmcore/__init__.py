"""What the Tenfold packages share. Import the submodule you need: `from lmcore import checkpoint`."""
