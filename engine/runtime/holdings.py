"""What an engine holds beside requests: its own workspace, documents, and heads of earlier prompts."""

from longshadow.engine.runtime.documents import Document, new_document_id
from longshadow.engine.runtime.errors import RequestTooLong
from longshadow.engine.runtime.memory import Bytes, MemoryBudget
from longshadow.engine.runtime.prefixes import Head, PrefixCache


class Holdings:
    """Documents and heads within the memory budget. Not safe for threads: the engine's lock guards it.

    Attributes:
        held: bytes that no request gives back: the engine's own part and documents.
    """

    def __init__(self, budget: MemoryBudget, fixed: Bytes, prefixes: PrefixCache | None) -> None:
        """`fixed`: what the engine itself takes. Raises ValueError when that does not fit."""
        if not budget.fits(fixed):
            raise ValueError(
                f"device_memory leaves {budget.device_limit:,} bytes, but a step alone needs {fixed.device:,}; "
                "give more, or a smaller max_prefill_tokens or max_model_len"
            )
        budget.reserve(fixed)
        self.budget = budget
        self.held = fixed
        self.prefixes = prefixes
        self.documents: dict[str, Document] = {}

    def reserve(self, need: Bytes) -> None:
        """Takes memory for a document from elsewhere. Raises RequestTooLong when there is not enough now."""
        while not self.budget.fits(need):
            if not self.evict():
                raise RequestTooLong(
                    f"the document needs {need.device:,} bytes of device and {need.host:,} of host memory, more than "
                    "there are now"
                )
        self.budget.reserve(need)

    def hold(self, document: Document) -> None:
        """Takes up a document whose memory is reserved; its id changes when it is taken."""
        while document.id in self.documents:
            document.id = new_document_id()
        self.held += document.reserved
        self.documents[document.id] = document

    def remove(self, document: Document) -> bool:
        """Forgets a document; False when it is gone already. Its memory is given back when no request shares it."""
        if self.documents.get(document.id) is not document:
            return False
        del self.documents[document.id]
        document.is_removed = True
        self.give_back(document)
        return True

    def check(self, document: Document) -> None:
        """Raises ValueError for one that was removed or is another engine's."""
        if document.is_removed:
            raise ValueError(f"the document {document.id!r} was removed")
        if self.documents.get(document.id) is not document:
            raise ValueError(f"the document {document.id!r} belongs to another engine; save it there and load it here")

    def give_back(self, document: Document) -> None:
        """Frees a removed document that nobody uses."""
        if document.is_removed and document.num_users == 0:
            self.budget.release(document.reserved)
            self.held -= document.reserved
            document.reserved = Bytes()

    def keep(self, head: Head) -> None:
        """Keeps a prompt's head if there is memory for it."""
        if self.prefixes is not None and self.budget.fits(head.bytes):
            self.budget.reserve(head.bytes)
            self.budget.release(self.prefixes.put(head))

    def evict(self) -> bool:
        """Forgets the head that was not used for longest; False when there is none."""
        if self.prefixes is None or not len(self.prefixes):
            return False
        self.budget.release(self.prefixes.evict())
        return True
