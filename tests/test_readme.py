"""The README's Python blocks run as written, in order, in one namespace."""

import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_python_block_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 8
    program = "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_every_public_function() -> None:
    import wmtp

    missing = [name for name in wmtp.__all__ if name not in README and name != "nn"]
    exceptions = {"weighted_mtp_loss_and_stats", "linear_weighted_mtp_loss_and_stats"}
    assert set(missing) <= exceptions


def test_the_commands_of_ci_are_marked() -> None:
    for name in ("main", "test"):
        assert re.search(rf"<!-- ci:{name} -->\n```bash\n.+?```", README, flags=re.DOTALL), name
