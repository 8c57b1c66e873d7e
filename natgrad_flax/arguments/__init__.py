"""What callers give: numbers, arrays, and whether there is memory for what they ask."""
