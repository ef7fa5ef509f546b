"""Captions and answers from Python: python examples/python_api.py"""

from pathlib import Path

from idefics_cli import Idefics

model = Idefics.from_pretrained("demo")
images = sorted((Path(__file__).parent / "images").glob("*.png"))

# One Result for each image, in order. An image that cannot be read has an `error` and no text.
for result in model.caption_iter(images):
    print(f"{result.input.name}: {result.text if result.ok else result.error}")

# One in, one out: a question with the published prompt.
print(f"{images[0].name}: is there a red shape? {model.answer(images[0], 'Is there a red shape?').text}")

# A prompt is a sequence of texts and images, used word for word: here the question form the base models know.
instruction = "Instruction: provide an answer to the question. Use the image to answer.\nImage:"
question = "Question: How many objects are there? Answer:"
answer = model.generate([instruction, images[0], question], num_beams=3, max_new_tokens=5)
print(f"{images[0].name}: how many objects are there? {answer.text} (score {answer.score:.3f})")
