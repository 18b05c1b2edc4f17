// Renders the TEMPLATE of a Modelfile as Ollama does: go run render.go < JSON. Reads the Modelfile and conversations,
// writes the prompts. Ollama merges messages of one role in a row and passes system messages as .System too; its reader
// drops letters that are not printed.
package main

import (
	"encoding/json"
	"os"
	"strconv"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

func main() {
	var given struct {
		Modelfile     string      `json:"modelfile"`
		Conversations [][]message `json:"conversations"`
	}
	check(json.NewDecoder(os.Stdin).Decode(&given))
	printed := strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) || r == '\n' || r == '\t' {
			return r
		}
		return -1
	}, given.Modelfile)
	_, rest, found := strings.Cut(printed, "TEMPLATE \"\"\"")
	text, _, closed := strings.Cut(rest, "\"\"\"\n")
	if !found || !closed {
		panic("no TEMPLATE in the Modelfile")
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(text))
	prompts := []string{}
	for _, conversation := range given.Conversations {
		var system []string
		var messages []*message
		for i := range conversation {
			one := &conversation[i]
			if one.Role == "system" {
				system = append(system, one.Content)
			}
			if last := len(messages) - 1; last >= 0 && messages[last].Role == one.Role {
				messages[last].Content += "\n\n" + one.Content
			} else {
				messages = append(messages, one)
			}
		}
		var prompt strings.Builder
		check(parsed.Execute(&prompt, map[string]any{
			"System": strings.Join(system, "\n\n"), "Messages": messages, "Response": "",
		}))
		prompts = append(prompts, prompt.String())
	}
	check(json.NewEncoder(os.Stdout).Encode(prompts))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
