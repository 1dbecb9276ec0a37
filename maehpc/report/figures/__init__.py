"""Figures: each module draws one kind on plain arrays; `style` gives them one look and writes them."""
