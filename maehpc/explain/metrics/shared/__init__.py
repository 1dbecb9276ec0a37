"""What several metrics need: one value a pixel, keyed draws, removal of pixels, masks, first weights."""
