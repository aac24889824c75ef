"""The hot loops of siftmasks."""
