"""What the sessions of noxfile.py are made of.

- `environments`: the virtualenvs, what each has installed, and the settings that tests run with.
- `results`: how long a session took and how many tests it ran, and the summary at the end.
- `sessions`: the decorator that registers a session, and running pytest in an environment.
- `wheels`, `quickstart`, `benchmarks`: the work of the sessions that do more than call one tool.
- `write_artifacts`: the script that writes ``tests/artifacts``.
"""
