"""Tasks over the embedded stories, by rules that are written down, so that every answer is known.

    classification       what befalls: lost, stolen, feared or friend
    summarisation        who, whom they meet, and what befalls, in one line
    question_answering   who, what and which creature
    translation          the first sentence in a toy language, whose vowels are moved on by one
    dialogue             the same questions, one after another

And what may follow a story's first sentence, with its exact probabilities: as many references as one likes for each prompt.

Left out: how rows become prompts and completions (`tasks`).
"""

import random
import re

from . import stories
from .stories import RULES, Grammar

NAMES = {name for names in RULES["name"].table.values() for name in names}
JOBS = {job for jobs in RULES["job"].table.values() for job in jobs}
THINGS = {thing for things in RULES["thing"].table.values() for thing in things}
CREATURES = {*RULES["helper"].table["he"], *RULES["beast"].table["he"], *RULES["friend"]}
TOY = str.maketrans("aeiouAEIOU", "eiouaEIOUA")
THEMES = {
    "lost": "a {thing} lost and found",
    "stolen": "a {thing} stolen and won back",
    "feared": "a danger that was none",
    "friend": "a friend in need",
}


def facts(text: str) -> dict[str, str]:
    """Who a story is about (`name`, `job`), whom they meet (`creature`) and what befalls (`kind`, `theme`)."""
    words = re.findall(r"\w+", text)
    found = {
        key: next((word for word in words if word in known), "")
        for key, known in (("name", NAMES), ("job", JOBS), ("thing", THINGS), ("creature", CREATURES))
    }
    signs = {"stolen": "stole", "feared": "Everyone", "friend": "friend"}
    found["kind"] = next((kind for kind, sign in signs.items() if sign in words), "lost")
    found["theme"] = THEMES[found["kind"]].format(**found)
    return found


def story_task(task: str, num_examples: int, seed: int = 0) -> list[dict]:
    """Rows of a task, with the columns that its templates name (`hf_gdc.tasks`).

    Raises:
        ValueError: an unknown task.
    """
    if task not in MAKERS:
        raise ValueError(f"the stories have no task {task!r}; they have {', '.join(MAKERS)}.")
    choose = random.Random(f"{task} {seed}").choice
    return [MAKERS[task](text, facts(text), choose) for text in stories.sample(num_examples, seed)]


def _questions(found: dict[str, str]) -> list[tuple[str, str]]:
    return [
        ("Who is the story about?", found["name"]),
        (f"What is {found['name']}?", f"a {found['job']}"),
        ("Which creature is in the story?", f"the {found['creature']}"),
    ]


def _classification(text: str, found: dict, choose) -> dict:
    return {"text": text, "label": found["kind"]}


def _summarisation(text: str, found: dict, choose) -> dict:
    return {"text": text, "summary": "{name} the {job} and the {creature}: {theme}.".format(**found)}


def _question_answering(text: str, found: dict, choose) -> dict:
    question, answer = choose(_questions(found))
    return {"context": text, "question": question, "answer": answer}


def _translation(text: str, found: dict, choose) -> dict:
    first = "".join(text.partition(".")[:2])
    return {"source": first, "target": first.translate(TOY)}


def _dialogue(text: str, found: dict, choose) -> dict:
    turns = [turn for pair in _questions(found) for turn in pair]
    turns[0] = f"{text} {turns[0]}"
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]}


MAKERS = {
    "classification": _classification,
    "summarisation": _summarisation,
    "question_answering": _question_answering,
    "translation": _translation,
    "dialogue": _dialogue,
}


def after(first_sentence: str) -> Grammar:
    """The stories that begin with this first sentence: samples, and exact log-probabilities given it."""
    found = facts(first_sentence)
    he = "he" if found["name"] in RULES["name"].table["he"] else "she"
    fixed = {"he": he, "job": found["job"], "name": found["name"], "opening": first_sentence}
    return Grammar(RULES | fixed | {"story": "{!he}{!job}{opening} {plot}"})
