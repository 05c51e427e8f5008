"""Drives runs: what is recorded and live of one, its groups, their steps, and where those begin.

From the top: `runner` keeps one run; `group`, `work` and `sleeping` are what its code waits for;
`executor` and `local` begin bodies; `answers` and `attempts` take in how they ended.
"""
