"""Rotary embedding as the suite sees it: cases, condition, twin, wrong calls, mutants."""
