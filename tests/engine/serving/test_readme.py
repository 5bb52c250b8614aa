"""README's snippet for OpenAI clients, as it stands there."""

import re
from pathlib import Path

from tests.engine.serving.conftest import serving

README = Path(__file__).parents[3] / "README.md"
ADDRESS = "http://127.0.0.1:8000"


def test_the_snippet_runs(llm, tmp_path, monkeypatch, capsys):
    _, _, section = README.read_text(encoding="utf-8").partition("\n## Serve\n")
    snippet = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    model = re.search(r'model="(.*?)"', snippet)[1]
    assert snippet.count(ADDRESS) == 1 and f"longshadow serve {model} " in section
    (tmp_path / "report.txt").write_text("In May the gate was moved. " * 20)
    monkeypatch.chdir(tmp_path)
    with serving(llm, keeps_engine=True, model_name=model, default_max_tokens=5) as server:
        names = {}
        exec(compile(snippet.replace(ADDRESS, server.url), str(README), "exec"), names)
        assert names["answer"].usage.completion_tokens == 5
        cached = names["answer"].usage.prompt_tokens_details.cached_tokens
        assert cached == server.service.documents.find(names["document"]["id"]).num_tokens > 500
        assert capsys.readouterr().out.endswith(f" {cached}\n")
        server.service.documents.delete(names["document"]["id"])
