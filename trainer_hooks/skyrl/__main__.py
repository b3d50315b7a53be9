from trainer_hooks.skyrl import main

main()
