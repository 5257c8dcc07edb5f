"""Write the README's result tables from results/*.json, so that no number there is typed by hand.

Reads   results/NAME.json (metrics.json of stage 06), README.md with the lines `<!-- table NAME -->` and `<!-- end -->`
Writes  README.md, what stands between those lines
Usage   python bench/readme_tables.py
"""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def table(name):
    """Markdown: a row a model, nDCG@10 by language, both measures on average, and the test against the baseline."""
    result = json.loads((ROOT / "results" / f"{name}.json").read_text("utf-8"))
    models, tests = result["models"], result["tests"]
    langs = [lang for lang in next(iter(models.values())) if lang != "avg"]
    zero_shot = result["settings"]["zero_shot"]
    lines = ["| nDCG@10 | avg | R@100 | " + " | ".join(lang + "*" * (lang in zero_shot) for lang in langs) + " | difference (p) |",
             "|---|" + "---:|" * (len(langs) + 3)]
    for model, rows in models.items():
        test = tests.get(model)
        change = f"{100 * test['avg_diff']:+.1f} ({test['p']:.1g})" if test else ""
        lines.append(f"| {model} | **{100 * rows['avg']['ndcg@10']:.1f}** | {100 * rows['avg']['recall@100']:.1f} | "
                     + " | ".join(f"{100 * rows[lang]['ndcg@10']:.1f}" for lang in langs) + f" | {change} |")
    queries = models[next(iter(models))]["avg"]["queries"]
    return "\n".join(lines) + f"\n\n{queries} dev queries" + ("; * no training queries in this language" if zero_shot else "")


def fill(text):
    return re.sub(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text, flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text("utf-8")), "utf-8")
