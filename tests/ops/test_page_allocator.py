"""The page allocator against a plain Python model of sequences, through thousands of random operations."""

import random

import pytest
from fastgpt._C import OutOfPages, PageAllocator


class Model:
    """Sequences as lists of tokens; pages of the allocator as lists of what is written in them."""

    def __init__(self, allocator):
        self.allocator = allocator
        self.page_size = allocator.statistics()["page_size"]
        self.memory = {}  # page -> {row: token}
        self.tokens = {}  # sequence -> its tokens
        self.next_token = 0

    def append(self, sequences, counts):
        changes = self.allocator.append(sequences, counts)
        for source, target in zip(changes.copy_from, changes.copy_to, strict=True):
            self.memory[target] = dict(self.memory[source])
        for row, column, page in zip(changes.rows, changes.columns, changes.pages, strict=True):
            assert self.allocator.pages(sequences[row])[column] == page
            if page not in changes.copy_to:
                self.memory[page] = {}  # what was there before is nobody's
        for sequence, count in zip(sequences, counts, strict=True):
            pages = self.allocator.pages(sequence)
            for _ in range(count):
                position = len(self.tokens[sequence])
                self.memory[pages[position // self.page_size]][position % self.page_size] = self.next_token
                self.tokens[sequence].append(self.next_token)
                self.next_token += 1

    def check(self):
        """Each sequence reads what was appended to it, and no page is lost or shared wrongly."""
        owners = {}
        for sequence, tokens in self.tokens.items():
            pages = self.allocator.pages(sequence)
            assert self.allocator.length(sequence) == len(tokens)
            assert len(pages) == -(-len(tokens) // self.page_size) == len(set(pages))
            read = [self.memory[pages[i // self.page_size]][i % self.page_size] for i in range(len(tokens))]
            assert read == tokens
            for page in pages:
                owners[page] = owners.get(page, 0) + 1
        statistics = self.allocator.statistics()
        assert statistics["used_pages"] == len(owners)
        assert statistics["free_pages"] == statistics["num_pages"] - len(owners)
        assert statistics["shared_pages"] == sum(count > 1 for count in owners.values())
        assert statistics["sequences"] == len(self.tokens)
        assert statistics["tokens"] == sum(map(len, self.tokens.values()))


@pytest.mark.parametrize("num_pages, page_size, seed", [(40, 4, 0), (40, 1, 1), (7, 16, 2), (200, 3, 3), (0, 4, 4)])
def test_thousands_of_random_operations(num_pages, page_size, seed):
    draw = random.Random(seed)
    model = Model(PageAllocator(num_pages, page_size))
    refused = 0
    for _ in range(3000):
        operation = draw.choice(["allocate", "fork", "free", "truncate", "append", "append", "append"])
        alive = list(model.tokens)
        if operation == "allocate" or not alive:
            if len(alive) < 12:
                model.tokens[model.allocator.allocate()] = []
        elif operation == "fork":
            parent = draw.choice(alive)
            if len(alive) < 12:
                model.tokens[model.allocator.fork(parent)] = list(model.tokens[parent])
        elif operation == "free":
            sequence = draw.choice(alive)
            model.allocator.free(sequence)
            del model.tokens[sequence]
        elif operation == "truncate":
            sequence = draw.choice(alive)
            length = draw.randint(0, len(model.tokens[sequence]))
            model.allocator.truncate(sequence, length)
            del model.tokens[sequence][length:]
        else:
            sequences = draw.sample(alive, draw.randint(1, len(alive)))
            counts = [draw.randint(0, 2 * page_size + 1) for _ in sequences]
            before = [(model.allocator.pages(s), model.allocator.length(s)) for s in alive], model.allocator.statistics()
            try:
                model.append(sequences, counts)
            except OutOfPages:
                refused += 1
                after = [(model.allocator.pages(s), model.allocator.length(s)) for s in alive], model.allocator.statistics()
                assert after == before
        model.check()
    assert refused > 20  # the pool was full now and then


def test_pages_are_enough_exactly_when_they_are():
    """Of the writers of a shared page the last one keeps it, unless somebody else has it too."""
    allocator = PageAllocator(4, 8)
    first = allocator.allocate()
    allocator.append([first], [9])  # one full page, one token in the second
    second = allocator.fork(first)
    third = allocator.fork(first)
    with pytest.raises(OutOfPages, match=r"pages: expected 3 free for this step, got 2 of 4"):
        allocator.append([first, second], [1, 15])  # a copy for each, as the third still reads it, and a new page
    changes = allocator.append([first, second, third], [1, 1, 1])  # the third keeps the page
    assert changes.copy_from == [1, 1] and changes.copy_to == [2, 3]
    assert [allocator.pages(s) for s in (first, second, third)] == [[0, 2], [0, 3], [0, 1]]
    for sequence in (first, second, third):
        allocator.free(sequence)
    assert allocator.statistics()["free_pages"] == 4


def test_a_full_page_is_not_copied():
    allocator = PageAllocator(4, 2)
    first = allocator.allocate()
    allocator.append([first], [2])
    second = allocator.fork(first)
    changes = allocator.append([first, second], [1, 1])
    assert changes.copy_from == [] and allocator.statistics()["shared_pages"] == 1


def test_errors():
    allocator = PageAllocator(4, 2)
    sequence = allocator.allocate()
    for call in (allocator.free, allocator.fork, allocator.pages, allocator.length):
        with pytest.raises(ValueError, match="sequence: expected one that was allocated and not freed, got 7"):
            call(7)
    with pytest.raises(ValueError, match="counts: expected one for each of 1 sequences, got 2"):
        allocator.append([sequence], [1, 1])
    with pytest.raises(ValueError, match="counts: expected integers >= 0, got -1"):
        allocator.append([sequence], [-1])
    with pytest.raises(ValueError, match="sequences: expected distinct ones"):
        allocator.append([sequence, sequence], [1, 1])
    with pytest.raises(ValueError, match="length: expected from 0 to 0, got 1"):
        allocator.truncate(sequence, 1)
    allocator.free(sequence)
    with pytest.raises(ValueError, match="sequence: expected one that was allocated and not freed, got 0"):
        allocator.append([sequence], [1])
    for arguments, name in (((-1, 2), "num_pages"), ((1, 0), "page_size")):
        with pytest.raises(ValueError, match=f"{name}: expected an integer >= "):
            PageAllocator(*arguments)
