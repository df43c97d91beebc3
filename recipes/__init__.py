"""The recipes that come with the package; `vfl-train run NAME` finds them by name."""
