"""Training data: readers, row checks and quarantine, images, and the collator with the one answer mask."""
