"""Scorecards: what a model can do per function, and what an adapter gained and forgot."""
