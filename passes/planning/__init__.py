"""Planning products and sums: the forms that are equal, and which of them to take by measured seconds."""
