"""Pictures and pages: heat maps and self-contained HTML reports."""
