"""The hot loops of wiseft."""
