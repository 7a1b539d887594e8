"""Networks: building, pretrained weights, normalization, inspection."""
