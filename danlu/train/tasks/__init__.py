"""What a recipe's data and objective amount to: the rows, what is said of them, and how well."""
