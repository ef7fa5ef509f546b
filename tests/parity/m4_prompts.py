"""Prompts as the M4 evaluation writes them: `python tests/parity/m4_prompts.py > tests/parity/m4_prompts.json`.

Written from its published templates alone, without this package: the shots, then the query as a shot with an empty
answer (of which instruct models are not shown the end), the whole stripped, after `<s>`.
"""

import json

IMAGE = "<fake_token_around_image><image><fake_token_around_image>"
END = "<end_of_utterance>\n"
QUESTION = "Image:{image}Question: {question} Answer: {answer}\n"
TEMPLATES = {
    "caption": ("", "Image:{image}Caption: {answer}\n"),
    "vqa": ("Instruction: provide an answer to the question. Use the image to answer.\n", QUESTION),
    "vizwiz": (
        "Task: Answer the questions based on the image when possible, otherwise say unanswerable.\n",
        QUESTION,
    ),
    "instruct-caption": ("", f"User:{{image}}Describe the image briefly.{END}Assistant: {{answer}}{END}"),
    "instruct-vqa": ("", f"User:{{image}}{{question}}{END}Assistant: {{answer}}{END}"),
}
SAMPLES = [
    ("What color is the bus?", "red"),
    ("How many people are there?", "2"),
    ("Qu'est-ce que c'est ?", "un café à Orléans"),
    ("is it 5:30  or 17:30", "5:30 pm"),
    ("What does the sign say (in capitals)?", 'it says "STOP!"'),
]


def prompt(template: str, shots: list, query: str, with_images: bool) -> str:
    prefix, shot = TEMPLATES[template]
    shown = [shot.format(image=IMAGE if with_images else "", question=q, answer=a) for q, a in shots]
    asked = shot.format(image=IMAGE, question=query, answer="")
    if template.startswith("instruct"):
        asked = asked[: -len(END)].strip()
    return f"<s>{prefix}{''.join(shown)}{asked}".strip()


if __name__ == "__main__":
    cases = [
        {"template": name, "shots": SAMPLES[:number], "query": SAMPLES[-1][0], "with_images": with_images}
        for name in TEMPLATES
        for number, with_images in ((0, True), (1, True), (2, True), (4, True), (2, False))
    ]
    cases = [{**case, "prompt": prompt(*case.values())} for case in cases]
    print(json.dumps(cases, indent=1, ensure_ascii=False))
