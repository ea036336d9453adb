# Gives stable names to devices. Variables: table is the file of names (old, for file systems, for the kernel's command line; apart by
# tabs); mode is field1 (fstab), field2 (crypttab) or words (root=, resume=, boot= anywhere in a line). All else stays byte for byte.
BEGIN {
    while ((getline line < table) > 0) {
        split(line, part, "\t")
        in_file[part[1]] = part[2]
        in_words[part[1]] = part[3]
    }
}

function field(line, before,    head, rest) {
    if (!match(line, before)) return line
    head = substr(line, 1, RLENGTH)
    rest = substr(line, RLENGTH + 1)
    if (!match(rest, /^[^ \t]+/)) return line
    name = substr(rest, 1, RLENGTH)
    return (name in in_file) ? head in_file[name] substr(rest, RLENGTH + 1) : line
}

function words(line,    out, token, place, name, previous) {
    out = ""
    while (match(line, /(root|resume|RESUME|boot)=["']?\/dev\/[^ \t"',;)\\]+/)) {
        token = substr(line, RSTART, RLENGTH)
        previous = RSTART > 1 ? substr(line, RSTART - 1, 1) : " "
        out = out substr(line, 1, RSTART - 1)
        line = substr(line, RSTART + RLENGTH)
        place = index(token, "/dev/")
        name = substr(token, place)
        if ((name in in_words) && (previous !~ /[A-Za-z0-9.-]/)) token = substr(token, 1, place - 1) in_words[name]
        out = out token
    }
    return out line
}

/^[ \t]*#/ { print; next }
mode == "field1" { print field($0, "^[ \t]*"); next }
mode == "field2" { print field($0, "^[ \t]*[^ \t]+[ \t]+"); next }
{ print words($0) }
