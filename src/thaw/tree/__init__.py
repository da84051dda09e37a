"""The tree of a repository's sessions as a page: of `thaw serve`, and of `thaw show --html`.

    outline.py   which sessions there are and what forked from what: plain values, no HTML
    details.py   one commit with its turns and log probabilities, and where two points part: plain values
    markup.py    HTML that escapes by construction, and text of a model made safe to look at
    parts.py     values as fragments of HTML
    words.py     numbers as people read them
    page.py      the page of a server, and the file that needs none
    static/      one script and one style sheet

It reads a repository through `thaw.repo` and changes nothing. Everything that a model, a client or a branch's name may
say is hostile input: it is escaped wherever it is put, and what cannot be seen in it is made visible.
"""
