"""The record of what happened, and its renderings."""
